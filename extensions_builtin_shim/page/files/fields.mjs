// The form: what it says, and what a pasted text puts into it.

import { post } from "./api.mjs";
import { at, say } from "./elements.mjs";

const NUMBERS = { steps: "Steps", guidance: "CFG scale", seed: "Seed" };

/** The request that the form makes. Throws a sentence where a field is no number. */
export function request() {
  const invalid = Array.from(at("form").querySelectorAll(".fields input[type=number]")).find((input) => !input.checkValidity());
  if (invalid) throw new Error(`${labelOf(invalid)}: ${invalid.validationMessage}`);
  return {
    prompt: at("prompt").value,
    negative_prompt: at("negative").value,
    seed: at("seed").valueAsNumber,
    steps: at("steps").valueAsNumber,
    guidance: at("guidance").valueAsNumber,
    count: at("count").valueAsNumber,
  };
}

function labelOf(input) {
  return input.labels[0]?.innerText.trim() ?? input.id;
}

/** Takes apart the image's text that stands in the prompt, as the webui's paste button does. */
export async function readParameters() {
  const fields = await post("api/read-parameters", { text: at("prompt").value });
  if (!("Steps" in fields)) {
    say("There is no image's text in the prompt: paste one there first, with its last line (Steps: …, Seed: …).", true);
    return;
  }
  at("prompt").value = fields.Prompt;
  at("negative").value = fields["Negative prompt"];
  for (const [id, name] of Object.entries(NUMBERS)) if (name in fields) at(id).value = fields[name];
  at("count").value = 1;
  for (const id of ["prompt", "negative"]) window.updateInput(at(id));
  say("The fields are those of the image now.");
}
