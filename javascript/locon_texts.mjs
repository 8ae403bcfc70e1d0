// Small things done to texts, for the message below a prompt box and the editor's window. No DOM in here.

/** A tag cut to what stands around a place in it (counted in characters, as Python counts): before it, and behind. */
export function around(tag, at, width = 80) {
  const letters = Array.from(tag);
  const place = Math.max(0, Math.min(at, letters.length));
  const first = letters.length <= width ? 0 : Math.max(0, Math.min(place - Math.floor(width / 2), letters.length - width));
  const last = Math.min(letters.length, first + width);
  return {
    before: (first > 0 ? "…" : "") + letters.slice(first, place).join(""),
    behind: letters.slice(place, last).join("") + (last < letters.length ? "…" : ""),
  };
}

/** A word of the training captions as a prompt has to have it: brackets would change its strength there. */
export function forPrompt(word) {
  return word.replace(/[\\()[\]]/g, "\\$&");
}

/** A text of words between commas with `word` behind the others, or without it where it is one of them. */
export function withWord(text, word) {
  const parts = text.split(",");
  const place = parts.findIndex((part) => part.trim() === word);
  if (place < 0) {
    let end = text.length;
    while (end > 0 && /[\s,]/.test(text[end - 1])) end -= 1; // a pattern would begin anew in each row of blanks
    const kept = text.slice(0, end);
    return kept === "" ? word : `${kept}, ${word}`;
  }
  parts.splice(place, 1);
  return parts.join(",").trimStart();
}
