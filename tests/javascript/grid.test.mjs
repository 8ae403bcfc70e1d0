import assert from "node:assert/strict";
import { test } from "node:test";

import { cellPrompt, namesIn, strengthsIn } from "../../extensions_builtin_shim/page/files/grid_prompts.mjs";

const A = { name: "a", names: ["a", "sub/a"], inserted: "<lora:a:1>" };
const B = { name: "b", names: ["b"], inserted: "<lora:b:0.7> glow, (bright:1.2)" };

test("strengths", () => {
  assert.deepEqual(strengthsIn("0, 0.25;-1 1. .5\n+2"), ["0", "0.25", "-1", "1.", ".5", "+2"]);
  for (const text of ["", " , ", "1, two", "1e400", "1:2", "<b>"]) assert.throws(() => strengthsIn(text), Error);
});

test("a cell has its own adapter, at its strength, and none of the others", () => {
  const prompt = "cat <lora:a:0.5:1>, dog <lora:other:1> <lyco:sub/a:2><lora:b:te=1>";
  assert.equal(cellPrompt(prompt, [A, B], A, "0.5"), "cat , dog <lora:other:1> <lora:a:0.5>");
  assert.equal(cellPrompt(prompt, [A, B], B, "-1"), "cat , dog <lora:other:1> <lora:b:-1> glow, (bright:1.2)");
  assert.equal(cellPrompt("", [A], A, "0"), "<lora:a:0>");
});

test("names", () => {
  assert.deepEqual(namesIn("<lora:a:1> <lyco:b c:1:2> <hypernet:d:1>"), ["a", "b c"]);
});

test("100 000 characters without an end take no second", () => {
  const text = "<lora:".repeat(17_000);
  const started = performance.now();
  assert.deepEqual(namesIn(text), []);
  assert.equal(cellPrompt(text, [A], A, "1"), `${text} <lora:a:1>`);
  assert.throws(() => strengthsIn(`${"1".repeat(100_000)}x`), Error);
  assert.ok(performance.now() - started < 1000);
});
