// Puts the parts of the page together.

import { post } from "./api.mjs";
import { listCards } from "./cards.mjs";
import { at, say } from "./elements.mjs";
import { readParameters, request } from "./fields.mjs";
import { makeGrid, offerAdapters } from "./grid.mjs";
import { job } from "./jobs.mjs";
import { seedShown, showImages } from "./results.mjs";

function generate() {
  return job(async () => {
    const made = await post("api/generate", request());
    showImages(made);
    const { apply, sample } = made.seconds;
    const count = made.images.length;
    const what = `${count} image${count === 1 ? "" : "s"}, seed ${made.images[0].seed}`;
    say(`${made.interrupted ? "Interrupted: " : ""}${what}; adapters ${apply.toFixed(2)} s, sampling ${sample.toFixed(2)} s.`);
  });
}

function told(work) {
  return () => Promise.resolve().then(work).catch((error) => say(error.message, true));
}

at("form").noValidate = true; // request() says what is wrong, on the page
at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
at("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
});
at("dice").addEventListener("click", () => {
  at("seed").value = -1;
});
at("again").addEventListener("click", () => {
  if (seedShown() !== null) at("seed").value = seedShown();
});
at("read").addEventListener("click", told(readParameters));
at("grid-open").addEventListener("click", () => {
  const open = at("grid-panel").hidden;
  at("grid-panel").hidden = !open;
  at("grid-open").ariaExpanded = String(open);
  if (open) offerAdapters();
});
at("grid").addEventListener("click", () => makeGrid());
told(listCards)();
