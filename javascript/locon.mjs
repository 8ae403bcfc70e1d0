// What the extension does in the webui's page; the only one of its files that touches the DOM. It uses six names of the
// page: gradioApp, opts, updateInput, closePopup, onAfterUiUpdate and onOptionsChanged; it replaces one, cardClicked, and
// adds one, loconSaved. Texts of strangers (names, metadata) become text nodes here and nothing else.

// by the addresses under which the page has them, with the time of their last change: without it a browser may go on
// with the files of an older version, and an `import` statement has none
const addresses = [...document.scripts].map((script) => script.src);
const beside = (name) => {
  const plain = new URL(name, import.meta.url).href;
  return import(addresses.find((address) => address.split("?")[0] === plain) ?? plain);
};
const [completion, tags, texts] = await Promise.all(
  ["./locon_completion.mjs", "./locon_tags.mjs", "./locon_texts.mjs"].map(beside),
);
const { completed, keyed, openTag, othersComplete, wordNow } = completion;
const { adapterTags, calledIn, nameInserted, toggled, withSnippet } = tags;
const { around, forPrompt, withWord } = texts;

const CARDS = ".card[data-locon-names]";
const BOX = "[id$='_prompt']";
const FITS = 100; // names that the server takes at once
const TYPED = 60; // milliseconds after a letter, before the server is asked how it may go on
const PAUSED = 500; // and before it is asked what is wrong
const hostsCardClicked = window.cardClicked;

function option(name) {
  return window.opts?.[name] ?? true;
}

/** What our server answers; null where it does not, for whatever reason: nothing here is worth a message. */
async function ask(path, body) {
  try {
    const json = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    const answer = await fetch(path, body === undefined ? {} : json);
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

function make(name, className, text = "") {
  const element = document.createElement(name);
  element.className = className;
  element.textContent = text;
  return element;
}

function promptOf(tab, kind = "prompt") {
  return window.gradioApp().querySelector(`#${CSS.escape(tab)}_${kind} > label > textarea`);
}

function change(area, text) {
  if (area.value === text) return;
  area.value = text;
  window.updateInput(area);
}

// ---- cards

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

function tabOf(card) {
  return card.closest("[id$='_lora_cards']")?.id.replace(/_lora_cards$/, "");
}

/** The host's own toggle knows only `<type:name:number>`, so a negative or longer tag would get a second copy. */
function cardClicked(tab, text, negative, allowNegative) {
  if (text === "") return; // a card that inserts nothing: the host would take every separator out of the prompt
  const name = nameInserted(text);
  if (name === null || allowNegative) {
    hostsCardClicked?.(tab, text, negative, allowNegative);
    return;
  }
  const separator = window.opts?.extra_networks_add_text_separator ?? " ";
  const all = cards().map(namesOf);
  const names = all.find((known) => known.includes(name)) ?? [];
  const others = all.filter((known) => known !== names).flat();
  const area = promptOf(tab);
  const after = toggled(area.value, text, { names, others, separator });
  change(area, after.text);
  if (negative) {
    const negativeArea = promptOf(tab, "neg_prompt");
    change(negativeArea, withSnippet(negativeArea.value, negative, after.added, separator));
  }
  markCards();
}

/** Marks the cards whose adapter is in the prompt of their tab. */
function markCards() {
  const all = cards();
  for (const tab of new Set(all.map(tabOf))) {
    const shown = all.filter((card) => tab !== undefined && tabOf(card) === tab);
    const used = calledIn(promptOf(tab)?.value ?? "", shown.map(namesOf));
    for (const [place, card] of shown.entries()) card.classList.toggle("locon-used", used.has(place));
  }
}

function showHidden(button) {
  const all = button.closest(".locon-page").classList.toggle("locon-all");
  button.textContent = all ? "Hide" : "Show";
}

// ---- how much of a card's file fits the model: asked for the cards in sight

const inSight = new Set();
let fitsTimer = 0;
let fitsAsked = 0;
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) inSight.add(target);
    else inSight.delete(target);
  }
  askFitsSoon();
});
const watched = new WeakSet();

function watchCards() {
  for (const card of cards()) {
    if (watched.has(card)) continue;
    watched.add(card);
    watcher.observe(card);
  }
}

function askFitsSoon() {
  clearTimeout(fitsTimer);
  fitsTimer = setTimeout(askFits, 300);
}

async function askFits() {
  fitsAsked += 1;
  const number = fitsAsked;
  const pages = Array.from(window.gradioApp().querySelectorAll(".locon-page"));
  const seen = [...inSight].filter((card) => card.isConnected);
  const names = [...new Set(seen.map((card) => card.dataset.name))];
  for (let start = 0; pages.length > 0 && (start === 0 || start < names.length); start += FITS) {
    const found = await ask("./locon/v1/fit", { names: names.slice(start, start + FITS) });
    if (number !== fitsAsked) return; // asked again since, perhaps of another model
    if (!found || found.model === null) return; // it is being loaded
    for (const page of pages) page.classList.toggle("locon-stale", (page.dataset.loconModel ?? found.model) !== found.model);
    for (const card of seen) if (card.dataset.name in found.fits) showFit(card, found.fits[card.dataset.name]);
  }
}

function showFit(card, fit) {
  const badges = card.querySelector(".locon-badges");
  badges?.querySelector(".locon-partial")?.remove();
  if (!badges || !fit || fit.used === fit.total || badges.querySelector(".locon-problem")) return;
  const none = fit.used === 0;
  const badge = make("span", `locon-badge locon-partial ${none ? "locon-problem" : "locon-warning"}`);
  badge.textContent = none ? "does not fit" : `${fit.used}/${fit.total} layers fit`;
  badge.title = `${fit.used} of its ${fit.total} layers fit the loaded model; not used: ${fit.why}`;
  badges.append(badge);
}

// ---- completion in the prompt boxes

const list = { area: null, before: "", place: null, offers: [], chosen: 0, element: null };
let typedTimer = 0;
let asked = 0;

function offerSoon(area) {
  clearTimeout(typedTimer);
  asked += 1; // an answer that is on its way is for another text
  const off = !option("locon_completion") || othersComplete(window.opts ?? {}, "TAC_CFG" in window);
  if (off || area.selectionStart !== area.selectionEnd || !openTag(area.value, area.selectionStart)) closeList();
  else typedTimer = setTimeout(offer, TYPED, area);
}

async function offer(area) {
  const number = asked;
  const { value, selectionStart } = area;
  const open = openTag(value, selectionStart);
  const found = open && await ask(`./locon/v1/complete?tag=${encodeURIComponent(open.tag.toWellFormed?.() ?? open.tag)}`);
  const still = number === asked && area.value === value && area.selectionStart === selectionStart && area.matches(":focus");
  if (!still) return;
  const only = found?.offers.length === 1 && found.offers[0].text === found.word;
  if (!found?.offers.length || only) closeList();
  else openList(area, found);
}

function openList(area, { kind, word, offers, total }) {
  closeList();
  const element = make("ul", "locon-list");
  element.id = "locon-list";
  element.setAttribute("role", "listbox");
  element.setAttribute("aria-label", "What can stand here");
  for (const [place, offered] of offers.entries()) {
    const item = make("li", "locon-offer");
    item.id = `locon-offer-${place}`;
    item.setAttribute("role", "option");
    item.append(make("span", "locon-offer-text", offered.text), make("span", "locon-offer-about", offered.about));
    element.append(item);
  }
  if (total > offers.length) element.append(make("li", "locon-more", `and ${total - offers.length} more: go on typing`));
  element.addEventListener("mousedown", (event) => {
    event.preventDefault(); // the box keeps the focus
    const item = event.target.closest(".locon-offer");
    if (item) take(Number(item.id.replace("locon-offer-", "")));
  });
  const { left, bottom, top, width } = area.getBoundingClientRect();
  element.style.left = `${left}px`;
  element.style.maxWidth = `${Math.max(width, 240)}px`;
  if (window.innerHeight - bottom > Math.min(240, top)) element.style.top = `${bottom}px`;
  else element.style.bottom = `${window.innerHeight - top}px`;
  document.body.append(element);
  Object.assign(list, { area, before: area.value.slice(0, area.selectionStart), place: { kind, word }, offers, element });
  area.setAttribute("aria-controls", element.id);
  choose(0);
}

function choose(place) {
  list.chosen = place;
  for (const item of list.element.querySelectorAll(".locon-offer")) {
    item.ariaSelected = String(item.id === `locon-offer-${place}`);
  }
  const item = list.element.querySelector(`#locon-offer-${place}`);
  list.area.setAttribute("aria-activedescendant", item.id);
  item.scrollIntoView({ block: "nearest" });
}

/** The word that a choice would replace; null where the list is for another place than the caret's. */
function wordHere() {
  return wordNow(list.before, list.place.word, list.area.value.slice(0, list.area.selectionStart));
}

function take(place) {
  const { area, offers } = list;
  const word = wordHere();
  if (word === null) {
    closeList();
    return;
  }
  const weight = offers[place].weight || String(window.opts?.extra_networks_default_multiplier ?? 1);
  const after = completed(area.value, area.selectionStart, { kind: list.place.kind, word }, offers[place].text, weight);
  closeList();
  change(area, after.text);
  area.setSelectionRange(after.caret, after.caret);
  if (/=$/.test(offers[place].text)) offerSoon(area); // lbw= has presets
}

function closeList() {
  const { area, element } = list;
  if (element === null) return;
  element.remove();
  area.removeAttribute("aria-controls");
  area.removeAttribute("aria-activedescendant");
  Object.assign(list, { area: null, offers: [], element: null });
  checkSoon(area);
}

/** As the user wants it: an answer that is on its way does not open it again. */
function dismissList() {
  clearTimeout(typedTimer);
  asked += 1;
  closeList();
}

function onKey(event) {
  if (list.element === null || event.target !== list.area || event.isComposing) return;
  if (event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  const done = keyed(event.key, list.chosen, list.offers.length);
  if (done === null || (done === "take" && wordHere() === null)) return;
  event.preventDefault();
  event.stopImmediatePropagation(); // Escape would interrupt the image that is being made
  if (done === "take") take(list.chosen);
  else if (done === "close") dismissList();
  else choose(done);
}

/** Whether a click, or a scroll of anything but the box itself, is outside the open list. */
function isOutside(event) {
  if (list.element === null || (event.type === "scroll" && event.target === list.area)) return false;
  return !(event.target instanceof Node && list.element.contains(event.target));
}

// ---- what is wrong with the tags of a prompt, below its box

const checks = new WeakMap(); // box → { value: what was last looked at, timer, busy }

function checkSoon(area) {
  const check = checks.get(area) ?? { value: "", timer: 0, busy: false };
  checks.set(area, check);
  clearTimeout(check.timer);
  if (area.value === check.value) return;
  if (option("locon_mistakes") && adapterTags(area.value).length > 0) {
    check.timer = setTimeout(checkBox, PAUSED, area, check);
  } else {
    check.value = area.value;
    showMistakes(area, []);
  }
}

async function checkBox(area, check) {
  if (check.busy || list.area === area) return; // looked at again when that is over
  check.busy = true;
  const { value } = area;
  const found = await ask("./locon/v1/parse", { prompt: value, negative: area.closest(BOX).id.endsWith("_neg_prompt") });
  check.busy = false;
  check.value = value;
  if (area.value !== value) checkSoon(area);
  else showMistakes(area, found?.mistakes ?? []);
}

function showMistakes(area, mistakes) {
  const box = area.closest(BOX);
  box.querySelector(".locon-mistakes")?.remove();
  if (mistakes.length === 0) return;
  const shown = make("div", "locon-mistakes");
  shown.setAttribute("role", "status");
  for (const { message, tag, at, warning } of mistakes) {
    const one = make("div", warning ? "locon-mistake locon-warning" : "locon-mistake");
    const { before, behind } = around(tag, at);
    const place = make("pre", "locon-place", `${before}${behind}\n`);
    place.append(make("span", "locon-gap", before), make("span", "locon-caret", "^"));
    one.append(make("span", "locon-sentence", message), place);
    shown.append(one);
  }
  box.append(shown);
}

/** Texts change without an event too: the host puts those of a pasted image there. */
function checkAll() {
  for (const area of window.gradioApp().querySelectorAll(`${BOX} > label > textarea`)) {
    if (area !== document.activeElement) checkSoon(area);
  }
}

// ---- the editor's window

async function refreshCard(card) {
  const wanted = new URLSearchParams({ page: "lora", tabname: tabOf(card), name: card.dataset.name });
  const answer = await ask(`./sd_extra_networks/get-single-card?${wanted}`);
  const fresh = answer && new DOMParser().parseFromString(answer.html, "text/html").querySelector(".card");
  if (!fresh) return;
  card.replaceWith(document.adoptNode(fresh));
  updatedSoon();
}

/** Called by the editor when it wrote something: the host's own way looks a card up by its name, unquoted. */
window.loconSaved = (name, close) => {
  if (!name) return;
  if (close) window.closePopup?.();
  for (const card of cards()) if (card.dataset.name === name) refreshCard(card);
};

function addWord(button) {
  const area = button.closest(".edit-user-metadata")?.querySelector(".locon-activation :is(textarea, input)");
  if (area) change(area, withWord(area.value, forPrompt(button.dataset.word)));
}

// ---- events

let scheduled = false;

function updatedSoon() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    markCards();
    watchCards();
    checkAll();
  });
}

window.cardClicked = cardClicked;
document.addEventListener("input", (event) => {
  if (event.target.tagName !== "TEXTAREA" || !event.target.closest(BOX)) return;
  updatedSoon();
  checkSoon(event.target);
  if (event.isTrusted && !event.isComposing) offerSoon(event.target);
  else closeList();
});
document.addEventListener("keydown", onKey, true);
document.addEventListener("focusout", (event) => list.area === event.target && closeList());
for (const kind of ["mousedown", "scroll", "resize"]) {
  window.addEventListener(kind, (event) => isOutside(event) && closeList(), true);
}
document.addEventListener("keyup", (event) => {
  const moved = ["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key);
  if (moved && list.area === event.target) closeList();
});
document.addEventListener("click", (event) => {
  const button = event.target.closest?.(".locon-show-hidden, .locon-word");
  if (button) (button.matches(".locon-word") ? addWord : showHidden)(button);
});
window.onAfterUiUpdate?.(updatedSoon);
updatedSoon(); // the page may have been there first
window.onOptionsChanged?.(askFitsSoon);
