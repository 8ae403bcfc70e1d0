// Adapter tags in a prompt, as plain text: no DOM in here, so that it runs under node in the tests.

// The host's own pattern for a tag, for the two kinds that are adapters'. What is inside may be anything but ">".
const TAG = /<(?:lora|lyco):([^>]+)>/g;

/** Every adapter tag of a text: where it stands, and the name it begins with. */
export function adapterTags(text) {
  return Array.from(text.matchAll(TAG), (match) => ({
    start: match.index,
    end: match.index + match[0].length,
    name: match[1].split(":", 1)[0].trim(),
  }));
}

/** The names that the adapter tags of a text call. */
export function namesIn(text) {
  return new Set(adapterTags(text).map((tag) => tag.name));
}

/** The name in what a card inserts; null where that is no adapter's tag. */
export function nameInserted(inserted) {
  const [tag] = adapterTags(inserted);
  return tag && tag.start === 0 ? tag.name : null;
}

/**
 * A prompt after a click on a card: without every tag that calls the adapter by one of its names, whatever numbers and
 * keys it has, or, where there was none, with the card's text at its end.
 */
export function toggled(text, inserted, { names = [], separator = " " } = {}) {
  const [own] = adapterTags(inserted);
  const called = new Set([own.name, ...names]);
  const found = adapterTags(text).filter((tag) => called.has(tag.name));
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
