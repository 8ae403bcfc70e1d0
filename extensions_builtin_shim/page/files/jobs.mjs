// One job at a time: its progress, its interrupt, and what goes wrong with it.

import { get, post } from "./api.mjs";
import { at, say } from "./elements.mjs";

const POLL = 200; // milliseconds

let running = null;

/** Whether the user has pressed Interrupt since the job began. */
export function interrupted() {
  return running?.interrupted ?? false;
}

/**
 * Runs `work`, which gets a function to tell how far it is as a whole: the part done, the part that runs now, a label.
 */
export async function job(work) {
  if (running) return;
  running = { interrupted: false, done: 0, part: 1, label: "" };
  setBusy(true);
  say("Waiting…");
  const timer = setInterval(poll, POLL);
  try {
    await work((done, part, label) => Object.assign(running, { done, part, label }));
  } catch (error) {
    say(error.message, true);
  } finally {
    clearInterval(timer);
    running = null;
    setBusy(false);
  }
}

async function poll() {
  try {
    const { progress, state } = await get("api/progress");
    if (!running || !state.job) return;
    at("progress").value = running.done + running.part * progress;
    const image = state.job_count > 1 ? `image ${Math.min(state.job_no + 1, state.job_count)} of ${state.job_count}, ` : "";
    say(`${running.label}${image}step ${state.sampling_step} of ${state.sampling_steps}${running.interrupted ? "; stopping…" : "…"}`);
  } catch {
    // the job itself will say what is wrong
  }
}

function setBusy(busy) {
  at("progress").hidden = !busy;
  at("progress").value = 0;
  at("interrupt").hidden = !busy;
  for (const id of ["generate", "grid"]) at(id).disabled = busy;
  at("results").ariaBusy = String(busy);
}

at("interrupt").addEventListener("click", () => {
  if (running) running.interrupted = true;
  post("api/interrupt").catch((error) => say(error.message, true));
});
