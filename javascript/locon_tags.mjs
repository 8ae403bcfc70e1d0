// Adapter tags in a prompt, as plain text: no DOM in here, so that it runs under node in the tests.

// The host's own pattern for a tag, of any kind: one begun inside another is none. What it holds is anything but ">".
const TAG = /<([\p{L}\p{N}_]+):([^>]+)>/gu;
const KINDS = ["lora", "lyco"];

/** Every adapter tag of a text: where it stands, and the name it begins with, as it is written. */
export function adapterTags(text) {
  // none ends behind the last ">": to look for an end there from each "<" would take the square of the text's length
  const found = text.slice(0, text.lastIndexOf(">") + 1).matchAll(TAG);
  return Array.from(found).filter((match) => KINDS.includes(match[1])).map((match) => ({
    start: match.index,
    end: match.index + match[0].length,
    name: match[2].split(":", 1)[0],
  }));
}

/** A name as names are compared: one form of Unicode, and no blanks at the ends of its own name and its folders'. */
export function tidy(name) {
  return name.normalize("NFC").split("/").map((part) => part.trim()).join("/");
}

/** The names that the adapter tags of a text call, as they are written. */
export function namesIn(text) {
  return new Set(adapterTags(text).map((tag) => tag.name));
}

/** The places of those of some adapters that the tags of a text call. `adapters` are lists of names. */
export function calledIn(text, adapters) {
  const written = namesIn(text);
  const called = new Set();
  const exact = new Set();
  for (const [place, names] of adapters.entries()) {
    for (const name of names) {
      if (!written.has(name)) continue;
      called.add(place);
      exact.add(name);
    }
  }
  const others = new Set([...written].filter((name) => !exact.has(name)).map(tidy));
  if (others.size === 0) return called;
  for (const [place, names] of adapters.entries()) if (names.some((name) => others.has(tidy(name)))) called.add(place);
  return called;
}

/** The name in what a card inserts; null where that is no adapter's tag. */
export function nameInserted(inserted) {
  const [tag] = adapterTags(inserted);
  return tag && tag.start === 0 ? tag.name : null;
}

/**
 * A prompt after a click on a card: without every tag that calls the adapter by one of its names, whatever numbers and
 * keys it has, or, where there was none, with the card's text at its end. `others` are the names of other adapters: a
 * tag that has exactly one of these is not this adapter's.
 */
export function toggled(text, inserted, { names = [], others = [], separator = " " } = {}) {
  const [own] = adapterTags(inserted);
  const exact = new Set([own.name, ...names]);
  const nearly = new Set([...exact].map(tidy));
  const taken = new Set(others);
  const calls = (name) => exact.has(name) || (!taken.has(name) && nearly.has(tidy(name)));
  const found = adapterTags(text).filter((tag) => calls(tag.name));
  if (found.length === 0) return { text: appended(text, inserted, separator), added: true };
  const activation = inserted.slice(own.end);
  const kept = found.reverse().reduce((rest, tag) => without(rest, tag.start, tag.end, separator, activation), text);
  return { text: kept, added: false };
}

/** A negative prompt that holds the snippet `(words:1)`, or does not, whatever its weight was changed to since. */
export function withSnippet(text, snippet, wanted, separator = " ") {
  const body = snippet.match(/^(\(.*:)[^:()]*\)$/s)?.[1];
  const found = body === undefined ? null : weighted(text, body);
  if (wanted) return found ? text : appended(text, snippet, separator);
  return found ? without(text, found.start, found.end, separator, "") : text;
}

function weighted(text, body) {
  for (let start = text.indexOf(body); start >= 0; start = text.indexOf(body, start + 1)) {
    const rest = text.slice(start + body.length).match(/^\s*[-+\d.]+\s*\)/);
    if (rest) return { start, end: start + body.length + rest[0].length };
  }
  return null;
}

function appended(text, addition, separator) {
  return text === "" ? addition : text + separator + addition;
}

function without(text, start, end, separator, following) {
  let before = text.slice(0, start);
  let after = text.slice(end);
  if (following && after.startsWith(following)) after = after.slice(following.length);
  // one separator went in with the tag, so one goes with it: the one before, or at the text's start the one behind
  if (separator && before.endsWith(separator)) before = before.slice(0, -separator.length);
  else if (separator && before === "" && after.startsWith(separator)) after = after.slice(separator.length);
  return before + after;
}
