import assert from "node:assert/strict";
import { test } from "node:test";

import { adapterTags, calledIn, nameInserted, namesIn, toggled, withSnippet } from "../../javascript/locon_tags.mjs";

const FORMS = [
  "<lora:a:1>", "<lora:a>", "<lora:a:-0.5>", "<lora:a:.5>", "<lora:a:+1e-1>", "<lora:a:0.5:1>", "<lora:a:0.5:1:4>",
  "<lora:a:te=0.5:unet=-1>", "<lora:a:te=0.5>", "<lora:a:1:lbw=0,0,1,0.5:start=3>", "<lora:a:0@0,1@0.5>",
  "<lora: a :1>", "<lyco:a:1>", "<lora:a:two>",
];

for (const form of FORMS) {
  test(`a click takes ${form} away`, () => {
    assert.deepEqual(toggled(`cat ${form}, dog`, "<lora:a:1>"), { text: "cat, dog", added: false });
    assert.equal(toggled(form, "<lora:a:1>").text, "");
    assert.equal(toggled(`${form} cat`, "<lora:a:1>").text, "cat");
  });
}

for (const name of ["a.b", "a+b*(c)[d]^$", "sub/a", "ä ö", "<b", "a=b"]) {
  test(`a name like ${name}`, () => {
    const inserted = `<lora:${name}:0.8>`;
    const added = toggled("cat <lora:other:1>", inserted);
    assert.deepEqual(added, { text: `cat <lora:other:1> ${inserted}`, added: true });
    assert.equal(toggled(added.text, inserted).text, "cat <lora:other:1>");
  });
}

for (const text of ["", "cat", "cat ", " cat\n", "cat, <lora:b:1>", "<lora:ab:1> <lora:b:1:a>", "a < b > c"]) {
  for (const inserted of ["<lora:a:1>", "<lora:a:-0.5> words, more (words)"]) {
    for (const separator of [" ", ", ", "", "\n"]) {
      test(`two clicks change nothing: ${JSON.stringify([text, inserted, separator])}`, () => {
        const once = toggled(text, inserted, { separator });
        assert.equal(once.added, true);
        assert.ok(once.text.startsWith(text) && once.text.endsWith(inserted));
        assert.deepEqual(toggled(once.text, inserted, { separator }), { text, added: false });
      });
    }
  }
}

test("every copy goes, by every name of the adapter, and no other adapter", () => {
  const text = "x <lora:sub/a:1> y <lora:alias:0.5:1> z <lora:ab:1> <lora:a:1>";
  assert.equal(toggled(text, "<lora:a:1>", { names: ["sub/a", "alias"] }).text, "x y z <lora:ab:1>");
});

test("blanks at a name's ends and the form of Unicode are of no matter, but another's exact name is", () => {
  const card = "<lora:na\u0308ive :1>";
  for (const name of ["na\u0308ive ", "na\u0308ive", " n\u00e4ive", "n\u00e4ive "]) {
    assert.equal(toggled(`cat <lora:${name}:0.5>`, card).text, "cat");
  }
  const others = ["n\u00e4ive"];
  assert.equal(toggled("cat <lora:n\u00e4ive:1>", card, { others }).added, true);
  assert.equal(toggled("cat <lora: n\u00e4ive:1>", card, { others }).added, false);
  assert.equal(toggled("<lora:my folder/x:1>", "<lora:my folder /x:1>").text, "");
});

test("which adapters a text calls", () => {
  const adapters = [["a", "sub/a"], ["a "], ["b", "e\u0301"], ["c"]];
  const called = (text) => [...calledIn(text, adapters)];
  assert.deepEqual(called("<lora:a:1>"), [0]);
  assert.deepEqual(called("<lora:a :1>"), [1]);
  assert.deepEqual(called("<lora: a:1>"), [0, 1]);
  assert.deepEqual(called("<lora:\u00e9:1> <lora:sub/a>"), [0, 2]);
  assert.deepEqual(called("cat <hypernet:c:1> <lora:d:1>"), []);
});

test("a tag is what the host takes for one", () => {
  assert.deepEqual(adapterTags("<lora:a <lora:b:1>").map((tag) => tag.name), ["a <lora"]);
  assert.deepEqual(adapterTags("<x:<lora:b:1>"), []);
  assert.deepEqual(adapterTags("<\u00e9:<lora:b:1>"), []);
  assert.deepEqual(adapterTags("<lora:><lora:b>").map((tag) => tag.name), ["b"]);
  assert.deepEqual(adapterTags("<lora:b\n:1>").map((tag) => tag.name), ["b\n"]);
});

for (const piece of ["<lora:", "<lora:a:1 ", "<lora:a:1> ", "<lora:b:1>, ", "<", "<a:", "<lora:a", "(ugly, bad:"]) {
  for (const end of ["", ">"]) {
    test(`100 000 characters of ${piece} and ${end} take no second`, () => {
      const text = piece.repeat(100_000 / piece.length) + end;
      const started = performance.now();
      adapterTags(text);
      namesIn(text);
      calledIn(text, [["a"], ["b"]]);
      toggled(text, "<lora:a:1> words", { separator: ", " });
      withSnippet(text, "(ugly, bad:1)", false, ", ");
      assert.ok(performance.now() - started < 1000);
    });
  }
}

test("the activation text goes only where it stands behind its tag", () => {
  const inserted = "<lora:a:1> glow";
  assert.equal(toggled("<lora:a:0.3> glow, cat", inserted).text, ", cat");
  assert.equal(toggled("glow <lora:a:0.3> cat", inserted).text, "glow cat");
});

test("the negative snippet follows the tag, whatever its weight", () => {
  assert.equal(withSnippet("", "(ugly, bad:1)", true), "(ugly, bad:1)");
  assert.equal(withSnippet("x", "(ugly, bad:1)", true), "x (ugly, bad:1)");
  assert.equal(withSnippet("x (ugly, bad:1.3)", "(ugly, bad:1)", true), "x (ugly, bad:1.3)");
  assert.equal(withSnippet("x (ugly, bad:1.3) y", "(ugly, bad:1)", false), "x y");
  assert.equal(withSnippet("x (ugly:1)", "(ugly, bad:1)", false), "x (ugly:1)");
  assert.equal(withSnippet("(a:b:1)", "(a:b:1)", false), "");
  assert.equal(withSnippet("(a (b:2):0.5)", "(a (b:2):1)", false), "");
});

test("what tags there are", () => {
  assert.deepEqual(adapterTags("a <lora:x:1> <hypernet:y:1> <lyco: z >"), [
    { start: 2, end: 12, name: "x" }, { start: 28, end: 38, name: " z " },
  ]);
  assert.deepEqual([...namesIn("<lora:x:1><lora:x:2><lora:y>")], ["x", "y"]);
  assert.equal(nameInserted("<lora:x:1> words"), "x");
  assert.equal(nameInserted("<hypernet:x:1>"), null);
  assert.equal(nameInserted("words <lora:x:1>"), null);
  assert.equal(nameInserted(""), null);
});
