// The few names that the webui's page offers to the scripts of extensions. They are loaded after this one.

import { get } from "./api.mjs";

const afterUpdate = [];

window.opts = {};
window.gradioApp = () => document;
window.updateInput = (area) => area.dispatchEvent(new Event("input", { bubbles: true }));
window.onAfterUiUpdate = (callback) => afterUpdate.push(callback);

/** Without an extension that knows better: the very text goes, or it is added. */
window.cardClicked = (tab, text) => {
  const area = document.querySelector(`#${tab}_prompt > label > textarea`);
  area.value = area.value.includes(text) ? area.value.replace(text, "") : `${area.value} ${text}`;
  window.updateInput(area);
};

new MutationObserver(() => afterUpdate.forEach((callback) => callback()))
  .observe(document.body, { childList: true, subtree: true });

get("api/options").then((options) => Object.assign(window.opts, options)).catch(() => {});
