// The images that were made, the one that is shown, its text, and what the extensions said about it.

import { at, make, say } from "./elements.mjs";

let shown = null;

export function seedShown() {
  return shown?.seed ?? null;
}

/** The images of a job, the first of them in large. */
export function showImages(job) {
  at("grid-result").hidden = true;
  const thumbs = job.images.map((image, index) => thumb(image, `Image ${index + 1}, seed ${image.seed}`));
  at("gallery").replaceChildren(...(job.images.length > 1 ? thumbs : []));
  show(job.images[0], thumbs[0]);
  showComments(job.comments);
}

export function thumb(image, label) {
  const button = make("button", { type: "button", className: "thumb", title: label, ariaLabel: label },
    make("img", { src: image.image, alt: "" }));
  button.addEventListener("click", () => show(image, button));
  return button;
}

export function show(image, button = null) {
  shown = image;
  at("image").src = image.image;
  at("image").alt = `Generated from: ${image.prompt}`;
  at("image").hidden = false;
  at("empty").hidden = true;
  at("infotext").textContent = image.infotext;
  at("infotext-row").hidden = false;
  for (const other of document.querySelectorAll(".thumb")) other.ariaCurrent = other === button ? "true" : null;
}

/** A sentence may wrap; a tag with the caret under it may not, or the caret would stand under another place. */
export function showComments(comments) {
  at("comments").replaceChildren(...comments.map((comment) => {
    const [sentence, ...place] = comment.split("\n");
    return make("li", {}, sentence, place.length > 0 ? make("pre", {}, place.join("\n")) : null);
  }));
}

at("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(at("infotext").textContent);
    say("The text is in the clipboard: paste it into the prompt and press Read parameters.");
  } catch {
    getSelection().selectAllChildren(at("infotext"));
    say("The text is selected: copy it with the keyboard.");
  }
});
