import assert from "node:assert/strict";
import { test } from "node:test";

import { around, forPrompt, withWord } from "../../javascript/locon_texts.mjs";

test("a short tag is shown whole", () => {
  assert.deepEqual(around("<lora:a:1.o>", 8), { before: "<lora:a:", behind: "1.o>" });
  assert.deepEqual(around("<lora:a:1.o>", 99), { before: "<lora:a:1.o>", behind: "" });
  assert.deepEqual(around("", 0), { before: "", behind: "" });
});

test("places are counted in characters, not in halves of them", () => {
  assert.deepEqual(around("<lora:🌟🌟:x>", 9), { before: "<lora:🌟🌟:", behind: "x>" });
});

test("of a long tag, what is around the place", () => {
  const tag = `<lora:${"a".repeat(200)}:${"b".repeat(200)}>`;
  for (let at = 0; at <= tag.length; at += 1) {
    const { before, behind } = around(tag, at, 40);
    assert.ok(Array.from(before + behind).length <= 42);
    const [left, right] = [before.replace("…", ""), behind.replace("…", "")];
    assert.ok(tag.slice(0, at).endsWith(left) && tag.slice(at).startsWith(right));
    assert.equal(before.startsWith("…"), left.length < at);
    assert.equal(behind.endsWith("…"), right.length < tag.length - at);
  }
});

test("a training word comes into the activation text and goes again", () => {
  for (const text of ["", "glow", "glow, (a, b:1.2)", "a,b"]) {
    const with_ = withWord(text, "cat");
    assert.equal(with_, text === "" ? "cat" : `${text}, cat`);
    assert.equal(withWord(with_, "cat"), text);
  }
  assert.equal(withWord("cat, dog", "cat"), "dog");
  assert.equal(withWord("concat, dog", "cat"), "concat, dog, cat");
  assert.equal(withWord("dog, ", "cat"), "dog, cat");
});

test("brackets of a word are no strength", () => {
  assert.equal(forPrompt("name (series)"), "name \\(series\\)");
  assert.equal(forPrompt("[a]\\b"), "\\[a\\]\\\\b");
  assert.equal(forPrompt("plain words"), "plain words");
});

for (const text of [" ".repeat(100_000) + "x", ", ".repeat(50_000) + "x", "x" + " ".repeat(100_000), "(".repeat(100_000)]) {
  test(`long texts take no second: ${JSON.stringify(text.slice(0, 4))}…`, () => {
    const started = performance.now();
    assert.ok(withWord(text, "cat").endsWith(", cat"));
    forPrompt(text);
    around(text, 50_000);
    assert.ok(performance.now() - started < 1000);
  });
}
