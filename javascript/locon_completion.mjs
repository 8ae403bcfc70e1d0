// Completion in a prompt box, as plain text: no DOM in here, so that it runs under node in the tests. What can be
// written in a tag is the server's to say; here is only where a tag begins, and what comes of a choice.

const LONGEST = 2000; // characters of a tag that the server looks at

/** The tag that is open at the caret: where it begins, and its text up to there. Null where none is. */
export function openTag(text, caret) {
  const before = text.slice(0, caret);
  const start = Math.max(before.lastIndexOf("<lora:"), before.lastIndexOf("<lyco:"));
  if (start < 0) return null;
  const tag = before.slice(start);
  return /[>\n]/.test(tag) || tag.length > LONGEST ? null : { start, tag };
}

/**
 * The text with what was chosen in the place of the `word` before the caret, and where the caret stands then. In a tag
 * that is closed already, the rest of the word behind the caret goes too; a name without a strength gets `weight`.
 */
export function completed(text, caret, { kind, word }, offered, weight) {
  const before = text.slice(0, caret - word.length);
  const rest = text.slice(caret);
  const closed = /^[^<>\n]*>/.test(rest);
  let behind = closed ? rest.replace(kind === "key" ? /^[^:=>]*/ : /^[^:>]*/, "") : rest;
  let written = before + offered;
  if (kind === "key" && closed && behind.startsWith("=")) behind = behind.slice(1);
  if (kind === "name" && !(closed && behind.startsWith(":"))) {
    written += `:${weight}`;
    if (!closed) behind = `>${behind}`;
  }
  return { text: written + behind, caret: written.length };
}

/**
 * What stands by now in the place of `word`, at whose end the text up to the caret was `before`: letters may have come
 * or gone while an answer was on its way. Null where something else is being written now.
 */
export function wordNow(before, word, now) {
  if (now === before) return word;
  const start = before.length - word.length;
  const written = now.slice(start);
  return now.startsWith(before.slice(0, start)) && !/[:=<>\n]/.test(written) ? written : null;
}

/** What a key does to an open list: a new place in it, "take", "close", or null for a key that is not the list's. */
export function keyed(key, place, count) {
  if (key === "ArrowDown") return (place + 1) % count;
  if (key === "ArrowUp") return (place + count - 1) % count;
  if (key === "PageDown") return Math.min(place + 8, count - 1);
  if (key === "PageUp") return Math.max(place - 8, 0);
  if (key === "Enter" || key === "Tab") return "take";
  return key === "Escape" ? "close" : null;
}

/**
 * Whether the tag-completion extension completes adapters' names: two lists in one box would fight for the keys.
 * `hasScript` is whether its script is on the page: its settings stay among the page's when it is gone, until a restart.
 */
export function othersComplete(opts, hasScript) {
  return hasScript && opts.tac_active !== false && opts.tac_useLoras !== false;
}
