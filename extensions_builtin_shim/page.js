// Whatever comes from files or from the user goes in by textContent, never as HTML.
const at = (id) => document.getElementById(id);

async function answer(request) {
  const response = await request;
  const data = await response.json();
  if (!response.ok) throw new Error(data.error);
  return data;
}

function show(text, isError = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", isError);
}

function fill(list, items) {
  list.replaceChildren(...items.map((item) => {
    const entry = document.createElement("li");
    entry.append(item);
    return entry;
  }));
}

function tagButton({ name, alias }) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = name;
  button.title = alias && alias !== name ? `also called ${alias}; click to add it to the prompt` : "click to add it to the prompt";
  button.addEventListener("click", () => {
    at("prompt").value = `${at("prompt").value.trimEnd()} <lora:${name}:1>`;
    at("prompt").focus();
  });
  return button;
}

async function listAdapters() {
  const { adapters } = await answer(fetch("api/adapters"));
  fill(at("adapters"), adapters.map(tagButton));
  at("none").hidden = adapters.length > 0;
}

async function generate() {
  show("Generating…");
  const run = await answer(fetch("api/generate", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      prompt: at("prompt").value,
      negative_prompt: at("negative").value,
      seed: at("seed").valueAsNumber,
      steps: at("steps").valueAsNumber,
    }),
  }));
  at("image").src = run.image;
  at("image").alt = `Generated from: ${run.prompt}`;
  at("image").hidden = false;
  fill(at("comments"), run.comments);
  const { apply, sample } = run.seconds;
  show(`Seed ${run.seed}, apply ${apply.toFixed(2)} s, sample ${sample.toFixed(2)} s, sha256 ${run.sha256.slice(0, 12)}`);
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("generate").disabled = true;
  try {
    await generate();
    await listAdapters();
  } catch (error) {
    show(error.message, true);
  } finally {
    at("generate").disabled = false;
  }
});

listAdapters().catch((error) => show(error.message, true));
