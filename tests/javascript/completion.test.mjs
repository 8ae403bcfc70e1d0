import assert from "node:assert/strict";
import { test } from "node:test";

import { completed, keyed, openTag, othersComplete, wordNow } from "../../javascript/locon_completion.mjs";

/** A text with its caret written as `|`. */
function at(marked) {
  return [marked.replace("|", ""), marked.indexOf("|")];
}

function marked({ text, caret }) {
  return `${text.slice(0, caret)}|${text.slice(caret)}`;
}

for (const [text, tag] of [
  ["cat <lora:|", "<lora:"],
  ["cat <lyco:a b|c:1>", "<lyco:a b"],
  ["<lora:a:1> <lora:b:te=|", "<lora:b:te="],
  ["<lora:a <lora:b|", "<lora:b"],
  ["<lora:<b|", "<lora:<b"],
  ["<lora:a:1>|", null],
  ["<lora:a:1> |", null],
  ["<lor|a:", null],
  ["<lora:a\n|", null],
  ["<hypernet:a|", null],
  ["|<lora:a>", null],
  ["", null],
]) {
  test(`the tag that is open in ${JSON.stringify(text)}`, () => {
    const open = openTag(...at(text));
    assert.equal(open?.tag ?? null, tag);
    if (open) assert.ok(text.startsWith(tag, open.start));
  });
}

test("no tag is that long", () => assert.equal(openTag(`<lora:${"x".repeat(3000)}`, 3006), null));

for (const [before, place, offered, after] of [
  ["cat <lora:gl|", { kind: "name", word: "gl" }, "glow", "cat <lora:glow:0.8|>"],
  ["<lora:gl| a (red:1.2), <lora:b:1>", { kind: "name", word: "gl" }, "glow", "<lora:glow:0.8|> a (red:1.2), <lora:b:1>"],
  ["<lora:gl|>", { kind: "name", word: "gl" }, "glow", "<lora:glow:0.8|>"],
  ["<lora:gl|ass:-1:te=2> x", { kind: "name", word: "gl" }, "glow", "<lora:glow|:-1:te=2> x"],
  ["<lora:|", { kind: "name", word: "" }, "a'b\"c&d [x] <b", "<lora:a'b\"c&d [x] <b:0.8|>"],
  ["<lora:$&|", { kind: "name", word: "$&" }, "$1$&", "<lora:$1$&:0.8|>"],
  ["<lora:a:t|>", { kind: "key", word: "t" }, "te1=", "<lora:a:te1=|>"],
  ["<lora:a:t|e=0.5>", { kind: "key", word: "t" }, "te1=", "<lora:a:te1=|0.5>"],
  ["<lora:a:t|", { kind: "key", word: "t" }, "te1=", "<lora:a:te1=|"],
  ["<lora:a:|:hr=1>", { kind: "key", word: "" }, "te=", "<lora:a:te=|:hr=1>"],
  ["<lora:a:lbw=O|UTD:x=2>", { kind: "lbw", word: "O" }, "OUTALL", "<lora:a:lbw=OUTALL|:x=2>"],
]) {
  test(`${offered} in ${before}`, () => {
    assert.equal(marked(completed(...at(before), place, offered, "0.8")), after);
  });
}

for (const [before, word, now, wanted] of [
  ["<lora:gl", "gl", "<lora:gl", "gl"],
  ["<lora:gl", "gl", "<lora:glow", "glow"],
  ["<lora:gl", "gl", "<lora:", ""],
  ["<lora:", "", "<lora:a b", "a b"],
  ["<lora:a=b<", "a=b<", "<lora:a=b<", "a=b<"],
  ["<lora:gl", "gl", "<lora:gl:", null],
  ["<lora:gl", "gl", "<lora:gl\n", null],
  ["<lora:a:lb", "lb", "<lora:a:lbw=O", null],
  ["<lora:gl", "gl", "<lora", null],
  ["<lora:gl", "gl", "x <lora:gl", null],
]) {
  test(`the word in ${JSON.stringify(now)} where a list was made for ${JSON.stringify(before)}`, () => {
    assert.equal(wordNow(before, word, now), wanted);
  });
}

test("the keys of an open list", () => {
  assert.equal(keyed("ArrowDown", 0, 3), 1);
  assert.equal(keyed("ArrowDown", 2, 3), 0);
  assert.equal(keyed("ArrowUp", 0, 3), 2);
  assert.equal(keyed("PageDown", 0, 50), 8);
  assert.equal(keyed("PageDown", 2, 3), 2);
  assert.equal(keyed("PageUp", 1, 3), 0);
  for (const key of ["Enter", "Tab"]) assert.equal(keyed(key, 0, 1), "take");
  assert.equal(keyed("Escape", 0, 1), "close");
  for (const key of ["a", "Backspace", "ArrowLeft", "Shift", " ", "Process"]) assert.equal(keyed(key, 0, 1), null);
});

test("the tag-completion extension goes first, where it completes adapters' names", () => {
  assert.equal(othersComplete({}, false), false);
  assert.equal(othersComplete({}, true), true);
  assert.equal(othersComplete({ tac_active: true, tac_useLoras: true }, true), true);
  assert.equal(othersComplete({ tac_active: true }, true), true);
  assert.equal(othersComplete({ tac_active: true, tac_useLoras: true }, false), false);
  assert.equal(othersComplete({ tac_active: false, tac_useLoras: true }, true), false);
  assert.equal(othersComplete({ tac_active: true, tac_useLoras: false }, true), false);
});
