// The page of `selsft inspect`. Tokens lie in typed arrays; of the rows, cut into segments, only those in view are in
// the document. A token t has a text, bits in `flags`, a score, a class (-1 negative, 0 neutral, 1 positive, 2 not
// scored) and a judgement (-1 wrong, 1 right, 0 unknown).
"use strict";
const $ = (id) => document.getElementById(id);
const D = JSON.parse($("data").textContent);
$("data").remove();
const { LABELLED, SCORED, SPECIAL, ROLE, START } = D.bits;
const SEGMENT = 400, BINS = 96, DRAWS = 300;

function unpack(text, Type) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Type(bytes.buffer);
}
const pieces = D.pieces, tokens = unpack(D.tokens, Uint32Array), offsets = unpack(D.offsets, Uint32Array);
const flags = unpack(D.flags, Uint8Array), numbers = unpack(D.numbers, Uint32Array);
const columns = Object.fromEntries(Object.entries(D.columns).map(([name, data]) => [name, unpack(data, Float32Array)]));
const weights = D.weights && unpack(D.weights, Float32Array);
const T = tokens.length, R = numbers.length;

const hidden = new RegExp(D.hidden, "gu");
const escaped = (c) => {
  const code = c.codePointAt(0), hex = code.toString(16);
  return code < 256 ? "\\x" + hex.padStart(2, "0") : code < 65536 ? "\\u" + hex.padStart(4, "0") : "\\U" + hex.padStart(8, "0");
};
const visible = (text) => text.replace(hidden, escaped);
const number = (value) => value.toLocaleString("en-US");
const percent = (value) => (100 * value).toFixed(value && value < 0.001 ? 3 : 1) + " %";
const fixed = (value, digits = 2) => (value < 0 ? "−" : "") + Math.abs(value).toFixed(digits);
const sized = (text) => [...text].length; // in code points, as Python counts

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
function drawing(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
function fillTable(id, rows) {
  $(id).replaceChildren(...rows.map((cells) => element("tr", {}, ...cells.map((cell, i) =>
    element(i ? "td" : "th", i ? { class: "n" } : { scope: "row" }, cell)))));
}

// ---------------------------------------------------------------- words

// A word begins behind white space, and where letters meet punctuation or a script that has no spaces.
const SPACE = 0, LETTER = 1, OTHER = 2, ALONE = 3, NOTHING = 4;
function kindOf(c) {
  if (c === undefined) return NOTHING;
  if (/\s/u.test(c)) return SPACE;
  if (/[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]/u.test(c)) return ALONE;
  return /[\p{L}\p{N}\p{M}_'’\u200c\u200d]/u.test(c) ? LETTER : OTHER;
}
const firstKind = new Uint8Array(pieces.length), lastKind = new Uint8Array(pieces.length);
pieces.forEach((piece, i) => {
  firstKind[i] = kindOf(piece === "" ? undefined : String.fromCodePoint(piece.codePointAt(0)));
  lastKind[i] = kindOf(piece === "" ? undefined : Array.from(piece.slice(-2)).pop());
});
const wordStart = new Uint8Array(T);
for (let r = 0; r < R; r++) {
  let last = SPACE, special = true;
  for (let t = offsets[r]; t < offsets[r + 1]; t++) {
    const first = firstKind[tokens[t]], own = (flags[t] & SPECIAL) > 0;
    if (t === offsets[r] || own || special) wordStart[t] = 1;
    else if (first !== NOTHING) wordStart[t] = +(first === SPACE || first === ALONE || first !== last);
    if (first !== NOTHING) last = lastKind[tokens[t]];
    special = own;
  }
}
const rowOf = (t) => {
  let low = 0, high = R - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (offsets[middle] <= t) low = middle; else high = middle - 1;
  }
  return low;
};
/** The whole words that the tokens from to end (exclusive) touch. */
function wholeWords(from, end) {
  const r = rowOf(from);
  while (from > offsets[r] && !wordStart[from]) from--;
  while (end < offsets[r + 1] && !wordStart[end]) end++;
  return [from, end];
}
function textOf(from, end) {
  let text = "";
  for (let t = from; t < end; t++) text += pieces[tokens[t]];
  return text;
}
let words = null; // {names, of: the word of each token, seen}; made when the table is first wanted
function findWords() {
  const names = [], seen = [], places = new Map(), of = new Int32Array(T).fill(-1);
  for (let t = 0; t < T;) {
    let end = t + 1;
    while (end < T && !wordStart[end]) end++;
    let scored = false;
    for (let i = t; i < end; i++) scored ||= (flags[i] & SCORED) > 0;
    if (scored) {
      const name = textOf(t, end).trim();
      if (name) {
        let place = places.get(name);
        if (place === undefined) places.set(name, (place = names.push(name) - 1)), seen.push(0);
        seen[place]++;
        of.fill(place, t, end);
      }
    }
    t = end;
  }
  return { names, of, seen };
}

// ---------------------------------------------------------------- scores and classes

const state = {
  score: D.settings.score, base: D.settings.score_base_weight, boundary: -D.settings.negative_threshold,
  band: D.settings.neutral_band, sort: "data", only: "all", facet: "", query: "",
};
const protect = D.settings.protect_special_tokens;
let score = new Float32Array(0), low = 0, high = 1, spread = 1;
const classOf = new Int8Array(T), negatives = new Uint32Array(R), scoredIn = new Uint32Array(R);
const judged = new Int8Array(T), marks = new Map(); // row -> [[start, end, weight], ...] in tokens of the row
const asGiven = () => state.score === "weights"; // classes by the sign of a weight: no threshold

function findScore() {
  if (state.score === "influence") {
    const { base_logps: policy, ref_logps: reference } = columns, base = Math.fround(state.base);
    score = new Float32Array(T);
    for (let t = 0; t < T; t++) score[t] = reference[t] - Math.fround(base * policy[t]);
  } else if (asGiven()) score = weights || new Float32Array(T).fill(1);
  else score = columns[state.score];
  const some = [], step = Math.max(1, Math.floor(T / 200000));
  for (let t = 0; t < T; t += step) if (flags[t] & SCORED && Number.isFinite(score[t])) some.push(score[t]);
  some.sort((a, b) => a - b);
  const at = (q) => some.length ? some[Math.min(some.length - 1, Math.floor(q * some.length))] : 0;
  low = Math.min(at(0.001), -D.settings.negative_threshold * (state.score === "influence"));
  high = Math.max(at(0.999), low + 1e-3);
  const margin = 0.03 * (high - low);
  low -= margin, high += margin;
  spread = Math.max(at(0.75) - at(0.25), (high - low) / 40);
  return at(0.05);
}

function classify() {
  const boundary = asGiven() ? 0 : Math.fround(state.boundary), band = Math.fround(state.band), zero = asGiven();
  for (let r = 0; r < R; r++) {
    let negative = 0, scored = 0;
    for (let t = offsets[r], end = offsets[r + 1]; t < end; t++) {
      const s = score[t];
      let c = 2;
      if (flags[t] & SCORED && Number.isFinite(s)) {
        c = s < boundary ? -1 : 1;
        if (band > 0 ? Math.abs(Math.fround(s - boundary)) <= band : zero && s === 0) c = 0;
        if (c < 0 && protect && !zero && flags[t] & SPECIAL) c = 1;
        scored++;
        if (c < 0) negative++;
      }
      classOf[t] = c;
    }
    negatives[r] = negative, scoredIn[r] = scored;
  }
}
/** How far a score lies from the boundary, in four steps. */
const depth = (t) => Math.min(3, Math.floor((2 * Math.abs(score[t] - (asGiven() ? 0 : state.boundary))) / spread));

/** The lowest sum of (score - boundary) over neighbouring tokens: the span that is worst as a whole. */
function worstSpan(r) {
  let best = 0, sum = 0;
  for (let t = offsets[r]; t < offsets[r + 1]; t++) {
    sum = classOf[t] === 2 ? 0 : Math.min(0, sum + score[t] - state.boundary);
    if (sum < best) best = sum;
  }
  return best;
}
function disagreement(r) {
  let count = 0;
  for (let t = offsets[r]; t < offsets[r + 1]; t++)
    count += classOf[t] !== 2 && judged[t] !== 0 && (classOf[t] < 0) !== (judged[t] < 0);
  return count;
}

// ---------------------------------------------------------------- the panel

function showShares() {
  let negative = 0, neutral = 0, scored = 0;
  for (let r = 0; r < R; r++) negative += negatives[r], scored += scoredIn[r];
  if (state.band > 0 || asGiven()) for (let t = 0; t < T; t++) neutral += classOf[t] === 0;
  $("shares").textContent = scored
    ? `${percent(negative / scored)} negative (${number(negative)} of ${number(scored)} scored tokens)` +
      (neutral ? `, ${percent(neutral / scored)} neutral` : "")
    : "No token is scored.";
  document.body.dataset.negative = negative;
  const lines = [];
  for (const name of D.facets) {
    const found = new Map();
    D.facts[name].forEach((value, r) => {
      const one = found.get(value) || [0, 0, 0];
      found.set(value, [one[0] + 1, one[1] + scoredIn[r], one[2] + negatives[r]]);
    });
    const share = (one) => one[2] / Math.max(one[1], 1);
    for (const [value, one] of [...found].sort((a, b) => share(b[1]) - share(a[1])))
      lines.push([visible(D.facets.length > 1 ? `${name}: ${value}` : String(value)), number(one[0]), number(one[2]), percent(share(one))]);
  }
  fillTable("sources", lines);
  $("sources-box").hidden = !lines.length;
}

function showWords() {
  if (!$("words-box").open) return;
  words ||= findWords();
  const counts = new Uint32Array(words.names.length);
  for (let t = 0, last = -1; t < T; t++) {
    if (wordStart[t]) last = -1;
    const word = words.of[t];
    if (word >= 0 && classOf[t] < 0 && last !== word) counts[last = word]++;
  }
  const best = [];
  let floor = 0;
  counts.forEach((count, word) => {
    if (count <= floor) return;
    best.push(word);
    if (best.length > 400) {
      best.sort((a, b) => counts[b] - counts[a]).length = 20;
      floor = counts[best[19]];
    }
  });
  best.sort((a, b) => counts[b] - counts[a]).length = Math.min(best.length, 20);
  fillTable("words", best.map((word) => {
    const button = element("button", { type: "button", class: "link", title: "show rows with this word" });
    button.append(element("bdi", {}, visible(words.names[word].slice(0, 40))));
    button.onclick = () => { $("search").value = words.names[word]; search(); };
    return [button, number(counts[word]), number(words.seen[word]), percent(counts[word] / words.seen[word])];
  }));
}

const place = (value) => (300 * (Math.min(Math.max(value, low), high) - low)) / (high - low);
let bins = null;
function findBins() {
  const all = new Float64Array(BINS), right = new Float64Array(BINS / 4), wrong = new Float64Array(BINS / 4);
  for (let t = 0; t < T; t++) {
    if (!(flags[t] & SCORED) || !Number.isFinite(score[t])) continue;
    const bin = Math.min(BINS - 1, Math.floor((place(score[t]) / 300) * BINS));
    all[bin]++;
    if (judged[t]) (judged[t] > 0 ? right : wrong)[Math.floor(bin / 4)]++;
  }
  bins = { all, right, wrong };
}
function showHistogram() {
  const svg = $("histogram"), height = 84;
  const shape = (counts, close) => {
    const top = Math.sqrt(Math.max(...counts, 1));
    let path = "";
    counts.forEach((count, i) => {
      const y = (height - (height - 6) * (Math.sqrt(count) / top)).toFixed(1);
      path += `${i ? "L" : "M"}${((300 * i) / counts.length).toFixed(1)} ${y}L${((300 * (i + 1)) / counts.length).toFixed(1)} ${y}`;
    });
    return close ? `M0 ${height}${path.replace("M", "L")}L300 ${height}Z` : path;
  };
  if (!svg.dataset.drawn) {
    svg.dataset.drawn = "1";
    svg.replaceChildren(
      drawing("path", { class: "bars", d: shape(bins.all, true) }),
      ...(marks.size ? [drawing("path", { class: "right", d: shape(bins.right) }), drawing("path", { class: "wrong", d: shape(bins.wrong) })] : []),
      drawing("rect", { class: "below", y: 0, height }), drawing("rect", { class: "within", y: 0, height }),
      drawing("line", { class: "edge", y1: 0, y2: height }));
    $("low").textContent = fixed(low), $("high").textContent = fixed(high);
  }
  const edge = place(state.boundary), [from, to] = [place(state.boundary - state.band), place(state.boundary + state.band)];
  const set = (name, values) => Object.entries(values).forEach(([key, value]) => svg.querySelector(name).setAttribute(key, value));
  set(".below", { x: 0, width: asGiven() ? 0 : from });
  set(".within", { x: from, width: asGiven() ? 0 : to - from });
  set(".edge", { x1: asGiven() ? -9 : edge, x2: asGiven() ? -9 : edge });
  $("classes").hidden = !marks.size;
}

function settingsText() {
  if (asGiven()) return "# the column token_weights is used as it is";
  const names = { token_scores: "given" };
  const lines = [`score: ${names[state.score] || state.score}`, `negative_threshold: ${-state.boundary || 0}`, `neutral_band: ${state.band}`];
  if (D.settings.has_base_weight && state.score === "influence") lines.push(`score_base_weight: ${state.base}`);
  return lines.join("\n");
}

// ---------------------------------------------------------------- judgement

/** Numbers from 0 to 1 that are the same every time (xorshift). */
function numbersFrom(seed) {
  return () => {
    seed ^= seed << 13, seed ^= seed >>> 17, seed ^= seed << 5;
    return (seed >>> 0) / 4294967296;
  };
}
function showJudgement() {
  const rows = [...marks.keys()].sort((a, b) => a - b);
  $("marked").textContent = rows.length ? `${number(rows.length)} rows are judged, ${number([...marks.values()].filter((spans) => !spans.length).length)} of them clean.` : "No row is judged yet.";
  $("export").disabled = $("forget").disabled = !rows.length;
  $("judgement-box").hidden = !rows.length;
  for (const choice of document.querySelectorAll(".for-judged")) choice.disabled = !rows.length;
  if (!rows.length) return;
  const counts = rows.map((r) => {
    let hit = 0, alarm = 0, missed = 0;
    for (let t = offsets[r]; t < offsets[r + 1]; t++) {
      if (classOf[t] === 2 || !judged[t]) continue;
      if (judged[t] < 0) classOf[t] < 0 ? hit++ : missed++;
      else if (classOf[t] < 0) alarm++;
    }
    return [hit, alarm, missed];
  });
  const random = numbersFrom(12345), draws = [[], []];
  const measure = (some) => {
    let hit = 0, alarm = 0, missed = 0;
    for (const [h, a, m] of some) hit += h, alarm += a, missed += m;
    return [hit / (hit + alarm), hit / (hit + missed)];
  };
  for (let i = 0; i < DRAWS; i++)
    measure(counts.map(() => counts[Math.floor(random() * counts.length)])).forEach((value, j) => Number.isNaN(value) || draws[j].push(value));
  const [precision, recall] = measure(counts);
  const within = (values) => {
    values.sort((a, b) => a - b);
    const end = (q) => fixed(values[Math.min(values.length - 1, Math.floor(q * values.length))]);
    return values.length ? ` [${end(0.025)}, ${end(0.975)}]` : "";
  };
  const curve = precisionCurve();
  const said = (name, value, values) => `${name} ${Number.isNaN(value) ? "–" : fixed(value) + within(values)}`;
  $("quality").textContent = `${said("Precision", precision, draws[0])}, ${said("recall", recall, draws[1]).toLowerCase()} at this threshold` +
    (curve.auc === null ? "" : `; AUC ${fixed(curve.auc)}`) + `. ${number(curve.total)} judged tokens, ${number(curve.wrong)} wrong.`;
  document.body.dataset.precision = precision, document.body.dataset.recall = recall;
  const d = curve.points.map(([x, y], i) => `${i ? "L" : "M"}${(30 + 260 * x).toFixed(1)} ${(110 - 100 * y).toFixed(1)}`).join("");
  const parts = [["0", 110], ["1", 10]].map(([text, y]) => Object.assign(drawing("text", { x: 22, y: y + 4, "text-anchor": "end" }), { textContent: text }));
  const label = (text, x, y) => Object.assign(drawing("text", { x, y, "text-anchor": "middle" }), { textContent: text });
  const dot = !(precision >= 0 && recall >= 0) ? [] : [drawing("circle", { cx: 30 + 260 * recall, cy: 110 - 100 * precision, r: 5 })];
  $("curve").replaceChildren(drawing("path", { class: "frame", d: "M30 10V110H290" }), drawing("path", { class: "wrong", d }), ...dot, ...parts, label("recall", 160, 126), label("precision", 64, 104));
}
/** Precision and recall for every boundary, lowest scores first; the area under the ROC curve. */
function precisionCurve() {
  const found = [];
  let wrong = 0;
  for (const r of marks.keys())
    for (let t = offsets[r]; t < offsets[r + 1]; t++)
      if (judged[t] && classOf[t] !== 2 && !(protect && flags[t] & SPECIAL)) found.push(t), wrong += judged[t] < 0;
  found.sort((a, b) => score[a] - score[b]);
  const points = [];
  let hit = 0, ranks = 0;
  for (let i = 0; i < found.length;) {
    let end = i, hits = 0;
    while (end < found.length && score[found[end]] === score[found[i]]) hits += judged[found[end++]] < 0;
    ranks += hits * ((i + 1 + end) / 2);
    hit += hits, i = end;
    points.push([wrong ? hit / wrong : 0, hit / end, end < found.length ? score[found[end]] : score[found[end - 1]] + 1e-3]);
  }
  const right = found.length - wrong;
  const auc = wrong && right ? 1 - (ranks - (wrong * (wrong + 1)) / 2) / (wrong * right) : null;
  return { points, auc, wrong, total: found.length };
}
function useTarget() {
  const wanted = Number($("target").value), { points } = precisionCurve();
  const best = points.filter(([, precision]) => precision >= wanted).pop();
  const top = Math.max(...points.map(([, precision]) => precision));
  $("target-said").textContent = best
    ? `Precision ${fixed(best[1])}, recall ${fixed(best[0])} on the judged rows.`
    : `No threshold reaches ${fixed(wanted)}; the best is ${fixed(top)}.`;
  if (best) setBoundary(best[2], true);
}

function judge(r) {
  const spans = marks.get(r);
  for (let t = offsets[r]; t < offsets[r + 1]; t++) judged[t] = spans && flags[t] & LABELLED ? 1 : 0;
  for (const [start, end, weight] of spans || [])
    for (let t = offsets[r] + start; t < offsets[r] + end; t++) if (flags[t] & LABELLED) judged[t] = Math.sign(weight);
}
/** Set the weight of some tokens of a row, or take their marks away (null). */
function mark(from, end, weight) {
  while (from < end && !(flags[from] & LABELLED)) from++;
  while (end > from && !(flags[end - 1] & LABELLED)) end--;
  if (from === end) return say("These tokens have no label: they are not trained on, so they are not judged.");
  const r = rowOf(from), start = from - offsets[r], stop = end - offsets[r], kept = [];
  for (const [s, e, w] of marks.get(r) || []) {
    if (s < start) kept.push([s, Math.min(e, start), w]);
    if (e > stop) kept.push([Math.max(s, stop), e, w]);
  }
  if (weight !== null) kept.push([start, stop, weight]);
  if (kept.length) marks.set(r, kept.sort((a, b) => a[0] - b[0])); else marks.delete(r);
  say(`${visible(textOf(from, end).trim())}: ${weight === null ? "no mark" : weight ? "wrong" : "unknown"}`);
  marksChanged([r]);
}
function toggleClean(r) {
  if (marks.has(r)) marks.delete(r); else marks.set(r, []);
  say(marks.has(r) ? `Row ${numbers[r]} is clean.` : `Row ${numbers[r]} is not judged.`);
  marksChanged([r]);
}
let unsaved = false;
function marksChanged(rows) {
  rows.forEach(judge);
  try {
    localStorage.setItem(`selsft-inspect:${D.key}`, JSON.stringify([...marks]));
  } catch {
    if (!unsaved) say("This browser keeps no marks for this page: export them before you close it.");
    unsaved = true;
  }
  findBins();
  delete $("histogram").dataset.drawn;
  showHistogram();
  showJudgement();
  refresh();
}
function loadMarks() {
  importRows(D.judged);
  try {
    for (const [r, spans] of JSON.parse(localStorage.getItem(`selsft-inspect:${D.key}`) || "[]")) if (r < R) marks.set(r, spans);
  } catch { /* not kept here */ }
  for (const r of marks.keys()) judge(r);
}

/** Runs of labelled tokens between special ones: what a model says. */
function answers(r) {
  const found = [];
  for (let t = offsets[r]; t < offsets[r + 1]; t++) {
    if (!(flags[t] & LABELLED) || flags[t] & SPECIAL) continue;
    if (found.length && found[found.length - 1][1] === t) found[found.length - 1][1]++; else found.push([t, t + 1]);
  }
  return found;
}
const beginOf = (r) => offsets[r] + +((flags[offsets[r]] & START) > 0);
/** Whether a row is a prompt and one answer, or one text; else its turns are written as one text. */
const isSingle = (r) => answers(r).length === 1;
/** A row as a line of a judged sample. Spans count characters of the completion, or of the text. */
function judgedRow(r, whole) {
  const begin = beginOf(r), end = offsets[r + 1], parts = answers(r);
  const single = !whole, [from, stop] = single ? parts[0] : [begin, end];
  const record = { row: numbers[r] };
  for (const [name, values] of Object.entries(D.facts)) if (values[r] !== null) record[name] = values[r];
  const prompt = single ? textOf(begin, from) : "";
  if (prompt) record.prompt = prompt;
  record[prompt ? "completion" : "text"] = textOf(from, stop);
  const at = new Map(); // where tokens begin
  let length = 0;
  for (let t = from; t < stop; t++) at.set(t, length), length += sized(pieces[tokens[t]]);
  at.set(stop, length);
  const spans = (marks.get(r) || []).map(([s, e, weight]) => {
    const first = Math.max(offsets[r] + s, from), last = Math.min(offsets[r] + e, stop), text = textOf(first, Math.max(first, last));
    const start = at.get(first) + sized(text) - sized(text.trimStart());
    return [start, start + sized(text.trim()), weight];
  }).filter(([start, stop]) => stop > start);
  if (!single) { // what is not an answer counts nowhere
    let last = begin;
    for (const [s, e] of [...parts, [end, end]]) {
      if (at.get(s) > at.get(last)) spans.push([at.get(last), at.get(s), 0]);
      last = e;
    }
  }
  record.spans = spans.sort((a, b) => a[0] - b[0]);
  return record;
}
function exportMarks() {
  const rows = [...marks.keys()].sort((a, b) => a - b);
  const prompts = new Set(rows.map((r) => isSingle(r) && answers(r)[0][0] > beginOf(r)));
  const whole = prompts.size > 1 || !rows.every(isSingle); // all rows of a file have one form
  const lines = rows.map((r) => JSON.stringify(judgedRow(r, whole)) + "\n");
  const link = element("a", { download: "judged.jsonl", href: URL.createObjectURL(new Blob(lines, { type: "application/jsonl" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** Show the marks of judged rows; says how many could not be found here. */
function importRows(rows) {
  const places = new Map(), changed = [];
  let unknown = 0, other = 0;
  if (rows.length) for (let r = 0; r < R; r++) {
    const parts = answers(r);
    for (const [from, end] of [...parts, [beginOf(r), offsets[r + 1]]]) {
      const key = textOf(from, end).trim();
      if (!places.has(key)) places.set(key, []);
      places.get(key).push([r, from, end]);
    }
  }
  const said = (value) => typeof value === "string" ? value : Array.isArray(value) ? value.map((part) => part.content ?? part.text ?? "").join("") : "";
  for (const row of rows) {
    const messages = row.messages || (Array.isArray(row.completion) ? row.completion : null);
    const texts = messages ? messages.filter((one) => one.role === "assistant") : [{ ...row, content: row.completion ?? row.text }];
    const ids = ["id", "source_row"].filter((name) => row[name] !== undefined && D.facts[name]);
    for (const { content, spans, weight, corrected } of texts) {
      if (!spans && weight === undefined && row.weight === undefined) { other += corrected !== undefined || !messages; continue; }
      const text = said(content), options = places.get(text.trim()) || [];
      const place = options.find(([r]) => ids.length && ids.every((name) => D.facts[name][r] === row[name])) || options[0];
      if (!place) { unknown++; continue; }
      const [r, from, end] = place, found = marks.get(r) || [];
      const lead = (value) => sized(value) - sized(value.trimStart()), shift = lead(textOf(from, end)) - lead(text);
      const all = spans || ((weight ?? row.weight) > 0 ? [] : [[0, sized(text)]]);
      for (const [start, stop, value] of all) {
        const inside = tokensAt(from, end, start + shift, stop + shift);
        const sign = typeof value === "number" ? value : -1;
        if (inside && flags[inside[0]] & LABELLED) found.push([inside[0] - offsets[r], inside[1] - offsets[r], sign]);
      }
      marks.set(r, found);
      changed.push(r);
    }
  }
  if (rows.length) say(`${number(changed.length)} judged rows are shown` +
    (unknown ? `; ${number(unknown)} are not in this data` : "") + (other ? `; ${number(other)} have no spans` : "") + ".");
  return changed;
}
/** The tokens that hold the characters start to stop (exclusive) of the text of from to end. */
function tokensAt(from, end, start, stop) {
  let at = 0, first = -1, last = -1;
  for (let t = from; t < end && at < stop; t++) {
    const next = at + sized(pieces[tokens[t]]);
    if (next > start && next > at && first < 0) first = t;
    if (first >= 0) last = t;
    at = next;
  }
  while (last >= 0 && last + 1 < end && pieces[tokens[last + 1]] === "") last++; // the rest of a character
  return first < 0 ? null : [first, last + 1];
}

// ---------------------------------------------------------------- rows in view

let order = [], itemRow = [], itemStart = [], heights = [], tops = [], texts = null;
const list = $("list"), live = new Map();
let cursor = -1, anchor = -1;

function choose() {
  const query = state.query.toLowerCase(), [facet, wanted] = state.facet ? JSON.parse(state.facet) : [null, null];
  if (query) texts ||= Array.from({ length: R }, (_, r) =>
    (textOf(offsets[r], offsets[r + 1]) + "\n" + Object.values(D.facts).map((values) => values[r]).join("\n")).toLowerCase());
  order = [];
  for (let r = 0; r < R; r++) {
    if (facet && D.facts[facet][r] !== wanted) continue;
    if (state.only === "negative" && !negatives[r]) continue;
    if (state.only === "judged" && !marks.has(r)) continue;
    if (state.only === "unjudged" && marks.has(r)) continue;
    if (query && !texts[r].includes(query)) continue;
    order.push(r);
  }
  const keys = {
    share: (r) => -negatives[r] / Math.max(scoredIn[r], 1), count: (r) => -negatives[r],
    span: worstSpan, disagreement: (r) => -disagreement(r),
  };
  if (keys[state.sort]) {
    const key = new Float64Array(R);
    for (const r of order) key[r] = keys[state.sort](r);
    order.sort((a, b) => key[a] - key[b] || a - b);
  }
  itemRow = [], itemStart = [];
  for (const r of order)
    for (let t = offsets[r]; t < Math.max(offsets[r + 1], offsets[r] + 1); t += SEGMENT) itemRow.push(r), itemStart.push(t);
  $("count").textContent = `${number(order.length)} of ${number(R)} rows`;
  list.setAttribute("aria-busy", "false");
  for (const made of live.values()) made.remove();
  live.clear();
  estimate();
}
const itemEnd = (i) => Math.min(itemStart[i] + SEGMENT, offsets[itemRow[i] + 1]);
function estimate() {
  const perLine = Math.max(20, list.clientWidth / 8.4);
  heights = itemRow.map((r, i) => 66 + 29 * Math.ceil(((itemEnd(i) - itemStart[i]) * 4.4) / perLine));
  stack();
  draw();
}
function stack() {
  tops = new Float64Array(heights.length + 1);
  for (let i = 0; i < heights.length; i++) tops[i + 1] = tops[i] + heights[i];
  list.style.height = `${tops[heights.length]}px`;
}
const itemAt = (y) => {
  let a = 0, b = heights.length - 1;
  while (a < b) {
    const middle = (a + b + 1) >> 1;
    if (tops[middle] <= y) a = middle; else b = middle - 1;
  }
  return a;
};
function draw(again = 4) {
  const above = -list.getBoundingClientRect().top;
  const first = itemAt(above - 300), last = heights.length ? itemAt(above + innerHeight + 300) : -1;
  for (const [i, made] of live)
    if ((i < first || i > last) && !made.contains(document.activeElement)) made.remove(), live.delete(i);
  let next = null;
  for (const [i, made] of live) if (i > last && (!next || i < next.i)) next = { i, made };
  next = next && next.made;
  for (let i = last; i >= first; i--) {
    let made = live.get(i);
    if (!made) live.set(i, (made = build(i))), list.insertBefore(made, next);
    next = made;
  }
  let changed = false, shift = 0;
  for (const [i, made] of live) {
    const height = made.offsetHeight + 10;
    if (Math.abs(height - heights[i]) < 0.5) continue;
    if (tops[i + 1] <= above) shift += height - heights[i];
    heights[i] = height, changed = true;
  }
  if (changed) stack();
  for (const [i, made] of live) made.style.transform = `translateY(${tops[i]}px)`;
  if (shift) scrollBy(0, shift);
  if (changed && again) draw(again - 1);
}

function build(i) {
  const r = itemRow[i], first = itemStart[i] === offsets[r], end = itemEnd(i);
  const name = `Row ${numbers[r]}` + (first ? "" : `, from token ${itemStart[i] - offsets[r]}`);
  const made = element("article", { class: "row", "aria-posinset": i + 1, "aria-setsize": itemRow.length, "aria-label": name });
  made.dataset.item = i;
  const facts = Object.entries(D.facts).filter(([, values]) => values[r] !== null).map(([key, values]) => `${key} ${values[r]}`);
  const clean = element("button", { type: "button", class: "clean", "aria-pressed": "false" }, "Clean");
  clean.onclick = () => toggleClean(r);
  const head = element("div", { class: "head" }, element("strong", {}, name), element("span", { class: "facts", dir: "auto" }, visible(facts.join(" · "))), element("span", { class: "share" }), clean);
  clean.hidden = !first;
  const text = element("div", {
    class: "tokens", tabindex: 0, dir: "auto", role: "textbox", "aria-readonly": "true", "aria-multiline": "true",
    "aria-label": `Text of ${name.toLowerCase()}`, "aria-describedby": "keys",
  });
  for (let t = itemStart[i]; t < end; t++) {
    const span = document.createElement("span");
    span.dataset.t = t;
    const shown = visible(pieces[tokens[t]]), word = shown.trimStart();
    if (word) text.append(shown.slice(0, shown.length - word.length)); // the space in front is not coloured
    span.textContent = (word || shown).replace(/\n/g, "↵\n");
    text.append(span);
  }
  made.append(head, text);
  paint(made, i);
  return made;
}
function paint(made, i) {
  const r = itemRow[i], share = scoredIn[r] ? `${percent(negatives[r] / scoredIn[r])} negative (${number(negatives[r])} of ${number(scoredIn[r])})` : "not scored";
  const spans = marks.get(r), wrong = spans && spans.filter(([, , weight]) => weight < 0).length;
  made.querySelector(".share").textContent = share + (spans ? ` · judged: ${wrong ? `${wrong} wrong` : "clean"}` : "");
  const clean = made.querySelector(".clean");
  clean.setAttribute("aria-pressed", String(!!spans && !spans.length));
  clean.textContent = !spans ? "Clean" : spans.length ? "Forget marks" : "Clean ✓";
  const [from, to] = cursor < anchor ? [cursor, anchor] : [anchor, cursor];
  for (const span of made.lastChild.children) {
    const t = +span.dataset.t, c = classOf[t], f = flags[t];
    let name = c < 0 ? `neg n${depth(t)}` : c === 0 ? "neu" : c === 1 ? `pos p${depth(t)}` : f & LABELLED ? "" : "masked";
    if (f & ROLE) name += " role"; else if (f & SPECIAL) name += " special";
    if (judged[t] < 0) name += " wrong";
    else if (spans && f & LABELLED && !judged[t]) name += " unknown";
    if (pieces[tokens[t]] === "") name += " rest";
    if (cursor >= 0 && t >= from && t <= to) name += t === cursor ? " cursor" : " picked";
    if (span.className !== name) span.className = name;
  }
}
function refresh() {
  for (const [i, made] of live) paint(made, i);
}

// ---------------------------------------------------------------- what a token says

const tip = $("tip");
function describe(t) {
  const c = classOf[t], f = flags[t];
  const kind = f & ROLE ? "role" : f & SPECIAL ? "special token" : !(f & LABELLED) ? "prompt, not trained on" : "";
  const lines = [[{ "-1": "negative", 0: "neutral", 1: "positive", 2: "not scored" }[c], kind]];
  for (const [name, label] of [["base_logps", "policy"], ["ref_logps", "reference"]])
    if (columns[name] && Number.isFinite(columns[name][t]) && f & SCORED)
      lines.push([`log p ${label}`, `${fixed(columns[name][t])} (p ${Math.exp(columns[name][t]).toPrecision(2)})`]);
  if (f & SCORED)
    for (const name of D.scores) if (!name.endsWith("_logps") && name !== "weights")
      lines.push([name, fixed(name === state.score ? score[t] : name === "influence" ? columns.ref_logps[t] - columns.base_logps[t] : columns[name][t], 3)]);
  if (weights) lines.push(["weight", fixed(weights[t], 3)]);
  if (judged[t]) lines.push(["judged", judged[t] < 0 ? "wrong" : "right"]);
  return [JSON.stringify(visible(pieces[tokens[t]])).slice(0, 120), lines];
}
function showTip(span) {
  const [name, lines] = describe(+span.dataset.t), box = span.getClientRects()[0] || span.getBoundingClientRect();
  tip.replaceChildren(element("code", { dir: "auto" }, name), ...lines.map(([key, value]) => element("div", {}, element("span", {}, key), element("span", {}, value))));
  tip.hidden = false;
  const width = tip.offsetWidth, height = tip.offsetHeight;
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - width - 4))}px`;
  tip.style.top = `${box.bottom + 6 + height > innerHeight ? Math.max(4, box.top - height - 6) : box.bottom + 6}px`;
}
const say = (text) => { $("said").textContent = text; };
list.addEventListener("pointerover", (event) => event.target.dataset.t !== undefined && showTip(event.target));
list.addEventListener("pointerleave", () => { tip.hidden = true; });

// ---------------------------------------------------------------- marking, with mouse and keyboard

const menu = $("menu");
const picked = () => (cursor < 0 ? null : wholeWords(Math.min(cursor, anchor), Math.max(cursor, anchor) + 1));
function act(weight) {
  const words = picked();
  if (words) mark(...words, weight);
  menu.hidden = true;
  getSelection().removeAllRanges();
}
function pick(from, to) {
  const parts = [from, to].map((node) => (node?.nodeType === 3 ? node.parentElement : node)?.closest?.("[data-t]"));
  return parts.every(Boolean) ? parts.map((span) => +span.dataset.t) : null;
}
document.addEventListener("pointerup", (event) => {
  if (menu.contains(event.target)) return;
  setTimeout(() => {
    const selection = getSelection();
    if (selection.isCollapsed || !selection.rangeCount) { menu.hidden = true; return; }
    const range = selection.getRangeAt(0), ends = pick(range.startContainer, range.endContainer);
    if (!ends || rowOf(ends[0]) !== rowOf(ends[1])) return;
    if (range.endOffset === 0 && ends[1] > ends[0]) ends[1]--;
    [anchor, cursor] = ends;
    refresh();
    const box = range.getBoundingClientRect();
    menu.hidden = false;
    menu.style.left = `${Math.max(4, Math.min(box.left, innerWidth - menu.offsetWidth - 4))}px`;
    menu.style.top = `${Math.max(4, box.top - menu.offsetHeight - 6)}px`;
    tip.hidden = true;
  });
});
for (const button of menu.children) button.onclick = () => act({ wrong: -1, unknown: 0, clear: null }[button.value]);

function moveTo(t, extend) {
  const made = [...live.values()].find((one) => one.contains(document.activeElement));
  if (!made) return;
  const i = +made.dataset.item;
  cursor = Math.max(itemStart[i], Math.min(itemEnd(i) - 1, t));
  if (!extend) anchor = cursor;
  refresh();
  const span = made.querySelector(`[data-t="${cursor}"]`);
  span.scrollIntoView({ block: "nearest" });
  showTip(span);
}
list.addEventListener("focusin", (event) => {
  if (!event.target.classList.contains("tokens") || !event.target.matches(":focus-visible")) return;
  const i = +event.target.parentElement.dataset.item;
  let t = itemStart[i];
  if (cursor >= t && cursor < itemEnd(i)) return;
  while (t < itemEnd(i) - 1 && classOf[t] === 2) t++;
  moveTo(t, false);
});
list.addEventListener("focusout", () => { tip.hidden = true; });
list.addEventListener("keydown", (event) => {
  if (!event.target.classList.contains("tokens") || event.altKey || event.metaKey) return;
  const i = +event.target.parentElement.dataset.item, step = event.key === "ArrowRight" ? 1 : -1;
  const actions = { w: () => act(-1), u: () => act(0), x: () => act(null), Delete: () => act(null), c: () => toggleClean(itemRow[i]) };
  if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
    let t = cursor + step;
    if (event.ctrlKey) while (t > itemStart[i] && t < itemEnd(i) - 1 && !wordStart[t]) t += step;
    moveTo(t, event.shiftKey);
  } else if (event.key === "Home" || event.key === "End") moveTo(event.key === "Home" ? itemStart[i] : itemEnd(i) - 1, event.shiftKey);
  else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const next = live.get(i + (event.key === "ArrowDown" ? 1 : -1));
    if (next) next.lastChild.focus(), next.scrollIntoView({ block: "nearest" });
  } else if (event.key === "Escape") tip.hidden = true, (anchor = cursor), refresh();
  else if (actions[event.key] && !event.ctrlKey) actions[event.key]();
  else return;
  event.preventDefault();
});

// ---------------------------------------------------------------- controls

const rounded = (value) => Number(value.toFixed(4)) || 0;
/** Classes have changed: recolour. Rows keep their places until the slider rests. */
function update(rest) {
  classify();
  showShares();
  showHistogram();
  showWords();
  showJudgement();
  $("settings").textContent = settingsText();
  if (rest && (state.sort !== "data" || state.only === "negative")) choose(); else refresh();
}
function setBoundary(value, rest) {
  state.boundary = rounded(value);
  $("boundary").value = state.boundary;
  if (document.activeElement !== $("boundary-number") || rest) $("boundary-number").value = state.boundary;
  update(rest);
}
function setBand(value, rest) {
  state.band = Math.max(0, rounded(value));
  $("band").value = state.band;
  if (document.activeElement !== $("band-number") || rest) $("band-number").value = state.band;
  update(rest);
}
function setScore(keep) {
  const start = findScore(), step = 10 ** Math.floor(Math.log10((high - low) / 500));
  for (const [id, from, to] of [["boundary", low, high], ["band", 0, (high - low) / 4]])
    Object.assign($(id), { min: rounded(from), max: rounded(to), step }), ($(`${id}-number`).step = step);
  for (const id of ["boundary", "boundary-number", "band", "band-number"]) $(id).disabled = asGiven();
  $("base-box").hidden = state.score !== "influence";
  findBins();
  delete $("histogram").dataset.drawn;
  if (!keep) state.boundary = rounded(start);
  setBoundary(state.boundary, false);
}
let searching = 0;
function search() {
  clearTimeout(searching);
  searching = setTimeout(() => { state.query = $("search").value; choose(); }, 120);
}
for (const name of D.scores) $("score").append(element("option", { value: name }, name === "weights" && !weights ? "what has a label" : name));
for (const name of D.facets) {
  const values = [...new Set(D.facts[name])].sort();
  $("facet").append(...values.map((value) => element("option", { value: JSON.stringify([name, value]) }, visible(`${name}: ${value}`))));
}
$("facet-box").hidden = !D.facets.length;
const live_ = (id, event, action) => $(id).addEventListener(event, action);
live_("score", "change", () => { state.score = $("score").value; setScore(false); choose(); });
live_("base", "input", () => { state.base = Number($("base").value) || 0; setScore(true); });
live_("base", "change", () => choose());
for (const [id, set] of [["boundary", setBoundary], ["band", setBand]])
  for (const [field, event] of [[id, "input"], [id, "change"], [`${id}-number`, "input"], [`${id}-number`, "change"]])
    live_(field, event, () => $(field).value !== "" && set(Number($(field).value), event === "change"));
for (const id of ["sort", "only", "facet"]) live_(id, "change", () => { state[id] = $(id).value; choose(); });
live_("search", "input", search);
live_("words-box", "toggle", showWords);
live_("copy", "click", async () => {
  const text = settingsText();
  try { await navigator.clipboard.writeText(text); } catch {
    getSelection().selectAllChildren($("settings"));
    document.execCommand("copy");
  }
  $("copied").textContent = "Copied.";
});
live_("target-use", "click", useTarget);
live_("export", "click", exportMarks);
live_("import", "change", async () => {
  const text = await $("import").files[0].text();
  try {
    marksChanged(importRows(text.split("\n").filter((line) => line.trim()).map((line) => JSON.parse(line))));
  } catch (error) { say(`This is not a judged sample: ${error.message}`); }
  $("import").value = "";
});
live_("forget", "click", () => {
  if (!confirm("Remove all marks of this page?")) return;
  const rows = [...marks.keys()];
  marks.clear();
  marksChanged(rows);
});
let waiting = false;
addEventListener("scroll", () => {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
}, { passive: true });
let width = 0;
new ResizeObserver(() => { if (list.clientWidth !== width) width = list.clientWidth, estimate(); }).observe(list);

if (innerWidth < 960) for (const box of document.querySelectorAll(".panel details")) box.open = false;
$("score").value = state.score;
$("base").value = state.base;
loadMarks();
setScore(true);
setBand(state.band, false);
width = list.clientWidth;
choose();
document.body.dataset.ready = "1";
