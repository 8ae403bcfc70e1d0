// The tabs of cards: what the extensions' pages list, to be searched, sorted and clicked.

import { get } from "./api.mjs";
import { at, breakable, make, say } from "./elements.mjs";

const TAB = "txt2img";
const SORTS = { default: "Path", name: "Name", date_created: "Created", date_modified: "Modified" };

let pages = [];

/** All adapters' names as the tags write them, for the grid. */
export function adapters() {
  return pages.flatMap((page) => page.cards).filter((card) => card.locon && !card.locon.hidden && !card.locon.problem);
}

export async function listCards({ refresh = false } = {}) {
  pages = (await get(`api/cards${refresh ? "?refresh=1" : ""}`)).pages;
  at("cards").replaceChildren(...pages.map(tab));
  for (const page of pages) arrange(page);
}

function tab(page) {
  const search = make("input", { type: "search", placeholder: "Search", ariaLabel: `Search ${page.title}`, className: "search" });
  const sort = make("select", { ariaLabel: "Sort by", className: "sort" },
    ...Object.entries(SORTS).map(([key, label]) => make("option", { value: key }, label)));
  const direction = make("button", { type: "button", className: "tool direction", title: "Turn the order round", ariaLabel: "Descending", ariaPressed: "false" }, "↑");
  const again = make("button", { type: "button", className: "tool refresh", title: "Look into the folders again", ariaLabel: "Refresh" }, "⟳");
  search.addEventListener("input", () => arrange(page));
  sort.addEventListener("change", () => arrange(page));
  direction.addEventListener("click", () => {
    const down = direction.ariaPressed !== "true";
    direction.ariaPressed = String(down);
    direction.textContent = down ? "↓" : "↑";
    arrange(page);
  });
  again.addEventListener("click", () => listCards({ refresh: true }).catch((error) => say(error.message, true)));
  const heading = make("div", { className: "cards-head" }, make("h2", {}, page.title), search, sort, direction, again);
  const cards = make("div", { id: `${TAB}_${page.name}_cards`, className: "extra-network-cards" }, ...page.cards.map((card) => cardOf(page, card)));
  if (page.cards.length === 0) cards.append(make("p", { className: "nocards" }, `There are none in ${page.folders.join(", ") || "no folder"}.`));
  return make("div", { id: `${TAB}_${page.name}`, className: "locon-page" }, heading, notes(page),
    make("div", { id: `${TAB}_${page.name}_pane`, className: "extra-network-pane" }, cards));
}

function notes(page) {
  const hidden = page.cards.filter((card) => card.locon?.hidden).length;
  const waiting = page.cards.filter((card) => card.locon?.waiting).length;
  if (!hidden && !waiting) return null;
  const note = make("p", { className: "locon-notes" });
  if (hidden) {
    note.append(hidden === 1 ? "1 adapter for another model is hidden. " : `${hidden} adapters for other models are hidden. `,
      make("button", { type: "button", className: "locon-show-hidden link" }, "Show"));
  }
  if (waiting) note.append(`${waiting === 1 ? "1 file is" : `${waiting} files are`} being read in the background; refresh to see more about them.`);
  return note;
}

function cardOf(page, card) {
  const about = card.locon;
  const data = { name: card.name };
  for (const [key, value] of Object.entries(card.sort_keys)) data[`sort${key[0].toUpperCase()}${key.slice(1)}`] = value;
  if (about) data.loconNames = JSON.stringify(about.names);
  if (about?.hidden) data.loconHidden = "";
  const element = make("button", { type: "button", className: "card", data, title: titleOf(card), disabled: !card.prompt },
    picture(card), badges(about), make("span", { className: "actions" },
      make("span", { className: "name" }, ...breakable(card.name)),
      make("span", { className: "description" }, card.description)));
  element.addEventListener("click", () => window.cardClicked(TAB, card.prompt, card.negative_prompt, page.allow_negative));
  return element;
}

function titleOf(card) {
  const about = card.locon;
  if (!about) return card.prompt;
  const words = about.triggers.slice(0, 8).join(", ");
  return [about.problem || card.prompt, `${kilobytes(about.size)}, base: ${about.base_reason || "not read yet"}`, words && `trained on: ${words}`]
    .filter(Boolean).join("\n");
}

function kilobytes(size) {
  return size < 1e6 ? `${(size / 1e3).toFixed(1)} kB` : `${(size / 1e6).toFixed(1)} MB`;
}

function picture(card) {
  if (card.preview) return make("img", { className: "preview", src: card.preview, alt: "", loading: "lazy" });
  return pattern(card.name);
}

/** A picture for a card without one: squares, mirrored, drawn from its name, so that cards can be told apart. */
function pattern(name) {
  let state = Array.from(name).reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 2147483647, 7) + 1;
  const next = () => (state = (state * 48271) % 2147483647) / 2147483647;
  for (let warm = 0; warm < 4; warm += 1) next(); // names that differ in one letter begin alike
  const drawing = at("pattern").content.firstElementChild.cloneNode(true);
  const square = drawing.firstElementChild;
  drawing.replaceChildren();
  drawing.style.setProperty("--hue", Math.floor(next() * 360));
  for (let row = 0; row < 5; row += 1) {
    for (let column = 0; column < 3; column += 1) {
      if (next() < 0.5) continue;
      for (const x of new Set([column, 4 - column])) {
        const one = square.cloneNode();
        one.setAttribute("x", x);
        one.setAttribute("y", row);
        drawing.append(one);
      }
    }
  }
  return drawing;
}

function badges(about) {
  if (!about) return null;
  const texts = [about.family, about.rank && `rank ${about.rank}`, about.base].filter(Boolean);
  const list = texts.map((text) => make("span", { className: "locon-badge" }, text));
  if (about.problem) list.push(make("span", { className: "locon-badge locon-problem" }, about.fits === false ? "does not fit" : "cannot be used"));
  else if (about.unread) list.push(make("span", { className: "locon-badge locon-warning" }, `${about.unread} keys unknown`));
  else if (about.waiting) list.push(make("span", { className: "locon-badge" }, "being read…"));
  return make("span", { className: "locon-badges" }, ...list);
}

/** Shows the cards that the search finds, in the order chosen. */
function arrange(page) {
  const root = at(`${TAB}_${page.name}`);
  const wanted = root.querySelector(".search").value.trim().toLowerCase();
  const key = root.querySelector(".sort").value;
  const sign = root.querySelector(".direction").ariaPressed === "true" ? -1 : 1;
  const cards = new Map(page.cards.map((card) => [card.name, card]));
  const elements = Array.from(root.querySelectorAll(".card"));
  for (const element of elements) {
    const card = cards.get(element.dataset.name);
    const text = [card.name, card.description, ...card.search_terms].join(" ").toLowerCase();
    element.hidden = !text.includes(wanted);
  }
  const value = (element) => cards.get(element.dataset.name).sort_keys[key];
  elements.sort((a, b) => sign * compared(value(a), value(b)));
  root.querySelector(".extra-network-cards").prepend(...elements);
}

function compared(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
}
