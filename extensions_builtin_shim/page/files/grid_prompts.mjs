// What the grid's cells ask for, as plain text: no DOM in here.

const TAG = /<(?:lora|lyco):([^>]+)>/g;

/** A text up to where its last tag may end: behind that, the pattern would look for an end from each `<`. */
function closed(text) {
  return text.slice(0, text.lastIndexOf(">") + 1);
}

/** The numbers in a text such as "0, 0.5 1". Throws a sentence for anything else. */
export function strengthsIn(text) {
  const words = text.split(/[\s,;]+/).filter(Boolean);
  if (words.length === 0) throw new Error("The grid needs strengths, such as 0, 0.5, 1.");
  for (const word of words) {
    if (!/^[-+]?(\d+(\.\d*)?|\.\d+)$/.test(word)) throw new Error(`${JSON.stringify(word)} is no strength: write numbers such as 0, 0.5, 1.`);
  }
  return words;
}

/** The names that the adapter tags of a prompt call. */
export function namesIn(prompt) {
  return Array.from(closed(prompt).matchAll(TAG), (match) => match[1].split(":", 1)[0].trim());
}

/** A prompt with one adapter at one strength: the tags of all adapters of the grid go, the one tag comes. */
export function cellPrompt(prompt, chosen, adapter, strength) {
  const called = new Set(chosen.flatMap((other) => other.names));
  const begun = closed(prompt);
  const kept = begun.replace(TAG, (tag, inside) => (called.has(inside.split(":", 1)[0].trim()) ? "" : tag));
  const rest = kept + prompt.slice(begun.length);
  const tag = adapter.inserted.replace(/^(<[^:]+:[^:]+):[^>]*>/, `$1:${strength}>`);
  return `${rest.replace(/ {2,}/g, " ").trim()} ${tag}`.trim();
}
