// Short names for what every part of the page does with the DOM. Nothing here, or anywhere, makes HTML from texts.

export function at(id) {
  return document.getElementById(id);
}

/** An element with properties, data-attributes (`data`) and children; texts among the children stay texts. */
export function make(name, { data = {}, ...properties } = {}, ...children) {
  const element = document.createElement(name);
  Object.assign(element, properties);
  Object.assign(element.dataset, data);
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

/** A name, with places where a line may break that a browser would not find by itself. */
export function breakable(name) {
  return name.split(/(?<=[_\-./\\])/).flatMap((part, index) => (index ? [document.createElement("wbr"), part] : [part]));
}

export function say(text, isError = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", isError);
}
