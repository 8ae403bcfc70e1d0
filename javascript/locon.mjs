// What the extension does in the webui's page; the only one of its files that touches the DOM. It uses four names of the
// page: gradioApp, opts, updateInput and onAfterUiUpdate, and replaces one: cardClicked.

import { nameInserted, namesIn, toggled, withSnippet } from "./locon_tags.mjs";

const CARDS = ".card[data-locon-names]";
const hostsCardClicked = window.cardClicked;

function promptOf(tab, kind = "prompt") {
  return window.gradioApp().querySelector(`#${CSS.escape(tab)}_${kind} > label > textarea`);
}

function change(area, text) {
  if (area.value === text) return;
  area.value = text;
  window.updateInput(area);
}

function namesOf(card) {
  try {
    return [card.dataset.name, ...JSON.parse(card.dataset.loconNames)];
  } catch {
    return [card.dataset.name];
  }
}

function cards() {
  return Array.from(window.gradioApp().querySelectorAll(CARDS));
}

/** The host's own toggle knows only `<type:name:number>`, so a negative or longer tag would get a second copy. */
function cardClicked(tab, text, negative, allowNegative) {
  if (text === "") return; // a file whose name no tag can hold; the host would take every separator out of the prompt
  const name = nameInserted(text);
  if (name === null || allowNegative) {
    hostsCardClicked?.(tab, text, negative, allowNegative);
    return;
  }
  const separator = window.opts?.extra_networks_add_text_separator ?? " ";
  const names = cards().map(namesOf).find((known) => known.includes(name)) ?? [];
  const area = promptOf(tab);
  const after = toggled(area.value, text, { names, separator });
  change(area, after.text);
  if (negative) {
    const negativeArea = promptOf(tab, "neg_prompt");
    change(negativeArea, withSnippet(negativeArea.value, negative, after.added, separator));
  }
  markCards();
}

/** Marks the cards whose adapter is in the prompt of their tab. */
function markCards() {
  const used = new Map();
  for (const card of cards()) {
    const tab = card.closest("[id$='_lora_cards']")?.id.replace(/_lora_cards$/, "");
    if (tab === undefined) continue;
    if (!used.has(tab)) used.set(tab, namesIn(promptOf(tab)?.value ?? ""));
    card.classList.toggle("locon-used", namesOf(card).some((name) => used.get(tab).has(name)));
  }
}

let scheduled = false;

function markCardsSoon() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    markCards();
  });
}

function showHidden(button) {
  const all = button.closest(".locon-page").classList.toggle("locon-all");
  button.textContent = all ? "Hide" : "Show";
}

window.cardClicked = cardClicked;
document.addEventListener("input", (event) => {
  if (event.target.closest?.("[id$='_prompt']")) markCardsSoon();
});
document.addEventListener("click", (event) => {
  const button = event.target.closest?.(".locon-show-hidden");
  if (button) showHidden(button);
});
window.onAfterUiUpdate?.(markCardsSoon);
