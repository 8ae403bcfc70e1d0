// Strength × adapter: one row for each adapter, one column for each strength.

import { post } from "./api.mjs";
import { adapters } from "./cards.mjs";
import { at, breakable, make, say } from "./elements.mjs";
import { request } from "./fields.mjs";
import { cellPrompt, namesIn, strengthsIn } from "./grid_prompts.mjs";
import { interrupted, job } from "./jobs.mjs";
import { show, showComments, thumb } from "./results.mjs";

const MOST = 200; // cells

/** Offers the adapters, with those ticked that are in the prompt, or all where none is. */
export function offerAdapters() {
  const used = new Set(namesIn(at("prompt").value));
  const isUsed = (card) => card.locon.names.some((name) => used.has(name));
  const all = !adapters().some(isUsed);
  const boxes = adapters().map((card) => make("label", { className: "chip" },
    make("input", { type: "checkbox", value: card.name, checked: all || isUsed(card) }), card.name));
  at("grid-adapters").replaceChildren(make("legend", {}, "Adapters"), ...boxes);
}

export function makeGrid() {
  return job(async (tell) => {
    const strengths = strengthsIn(at("grid-strengths").value);
    const ticked = new Set(Array.from(at("grid-adapters").querySelectorAll("input:checked"), (box) => box.value));
    const chosen = adapters().filter((card) => ticked.has(card.name))
      .map((card) => ({ name: card.name, names: card.locon.names, inserted: card.prompt }));
    if (chosen.length === 0) throw new Error("Tick at least one adapter for the grid.");
    if (chosen.length * strengths.length > MOST) throw new Error(`The grid would have more than ${MOST} images.`);
    await fill(table(chosen, strengths), chosen, strengths, tell);
  });
}

async function fill(cells, chosen, strengths, tell) {
  const fields = { ...request(), count: 1 };
  if (fields.seed === -1) fields.seed = Math.floor(Math.random() * 2 ** 32); // one for all cells, or they cannot be compared
  const comments = new Set();
  let done = 0;
  for (const [row, adapter] of chosen.entries()) {
    for (const [column, strength] of strengths.entries()) {
      if (interrupted()) return say(`Stopped after ${done} of ${cells.length} images.`);
      tell(done / cells.length, 1 / cells.length, `${adapter.name} at ${strength}: `);
      const made = await post("api/generate", { ...fields, prompt: cellPrompt(fields.prompt, chosen, adapter, strength) });
      const button = thumb(made.images[0], `${adapter.name} at ${strength}`);
      cells[row * strengths.length + column].replaceChildren(button);
      if (done === 0) show(made.images[0], button);
      made.comments.forEach((comment) => comments.add(comment));
      showComments([...comments]);
      done += 1;
    }
  }
  say(`A grid of ${done} images, seed ${fields.seed}. Click one to see its text.`);
}

function table(chosen, strengths) {
  const head = make("tr", {}, make("td"), ...strengths.map((strength) => make("th", { scope: "col" }, strength)));
  const rows = chosen.map((adapter) => make("tr", {}, make("th", { scope: "row" }, ...breakable(adapter.name)),
    ...strengths.map(() => make("td", { className: "cell" }))));
  at("grid-result").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
  at("grid-result").hidden = false;
  at("gallery").replaceChildren();
  return Array.from(at("grid-result").querySelectorAll("td.cell"));
}
