// The page of `selsft inspect`. Tokens lie in typed arrays; of the rows, cut into segments, only those in view are in
// the document. A token t has a text, bits in `flags`, a score, a class (-1 negative, 0 neutral, 1 positive, 2 not
// scored) and a judgement (-1 wrong, 1 right, 0 unknown).
"use strict";
const $ = (id) => document.getElementById(id);
const D = JSON.parse($("data").textContent);
$("data").remove();
const { LABELLED, SCORED, SPECIAL, ROLE, START, WORD, DOCUMENT } = D.bits;
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
  while (from > offsets[r] && !(flags[from] & WORD)) from--;
  while (end < offsets[r + 1] && !(flags[end] & WORD)) end++;
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
    while (end < T && !(flags[end] & WORD)) end++;
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
  score: D.settings.score, base: D.settings.score_base_weight, pooling: D.settings.score_pooling,
  lookahead: D.settings.score_lookahead, worst: D.settings.score_row_worst, band: D.settings.neutral_band,
  // By a share of the tokens, or by a threshold: then share is null
  share: D.settings.positive_fraction, boundary: -D.settings.negative_threshold,
  sort: "data", only: "all", facet: "", query: "",
};
const protect = D.settings.protect_special_tokens;
let score = new Float32Array(0), low = 0, high = 1, spread = 1, sorted = null;
const classOf = new Int8Array(T), negatives = new Uint32Array(R), scoredIn = new Uint32Array(R);
const judged = new Int8Array(T), marks = new Map(); // row -> [[start, end, weight], ...] in tokens of the row
const asGiven = () => state.score === "weights"; // classes by the sign of a weight: no threshold
const isScored = (t) => (flags[t] & SCORED) > 0 && Number.isFinite(score[t]);

/** The score of a token by itself, as `score_of` in Python. */
function scoreAlone(name) {
  const { base_logps: policy, ref_logps: reference, noisy_logps: noisy } = columns, base = Math.fround(state.base);
  if (name === "influence") return (t) => Math.fround(reference[t] - Math.fround(base * policy[t]));
  if (name === "contrast") return (t) => Math.fround(reference[t] - noisy[t]);
  if (name === "weights") return (t) => (weights ? weights[t] : 1);
  return (t) => columns[name][t];
}
/** Pools `score` over words, spans or documents, as `selection/pooling.py` does. */
function pool() {
  if (asGiven() || (state.pooling === "token" && !state.lookahead)) return;
  const own = score.slice(), mask = new Uint8Array(T), over = state.pooling === "row" ? DOCUMENT : WORD;
  for (let t = 0; t < T; t++) mask[t] = isScored(t);
  if (state.lookahead)
    for (let t = 0; t + 1 < T; t++) if (mask[t + 1]) own[t] += Math.fround(Math.fround(state.lookahead) * score[t + 1]);
  score = own.slice();
  if (state.pooling === "token") return;
  for (let start = 0, end; start < T; start = end) {
    for (end = start + 1; end < T && !(flags[end] & over); ) end++;
    if (state.pooling === "row") {
      let found = [];
      for (let t = start; t < end; t++) if (mask[t]) found.push(own[t]);
      if (state.worst !== null) found = found.sort((a, b) => a - b).slice(0, state.worst);
      score.fill(found.reduce((sum, value) => sum + value, 0) / Math.max(found.length, 1), start, end);
      continue;
    }
    let sum = 0, least = Infinity;
    for (let t = start; t < end; t++) {
      if (mask[t]) (sum += own[t]), (least = Math.min(least, own[t]));
      if (state.pooling === "span" && mask[t]) score[t] = least;
    }
    // Tokens that do not count keep their own score: nothing is made of it
    for (let t = start; t < end; t++) if (mask[t] && state.pooling !== "span") score[t] = state.pooling === "word" ? least : sum;
  }
}
function findScore() {
  const alone = scoreAlone(state.score);
  score = new Float32Array(T);
  for (let t = 0; t < T; t++) score[t] = alone(t);
  pool();
  sorted = new Float32Array(T);
  let n = 0;
  for (let t = 0; t < T; t++) if (isScored(t)) sorted[n++] = score[t];
  sorted = sorted.subarray(0, n).sort();
  const at = (q) => n ? sorted[Math.min(n - 1, Math.floor(q * n))] : 0;
  low = Math.min(at(0.001), state.share === null ? state.boundary : 0);
  high = Math.max(at(0.999), low + 1e-3);
  const margin = 0.03 * (high - low);
  low -= margin, high += margin;
  spread = Math.max(at(0.75) - at(0.25), (high - low) / 40);
}
/** The lowest of the best `fraction` of the scores, as `positive_fraction` has it. */
function boundaryAt(fraction) {
  const keep = Math.floor(fraction * sorted.length + 1e-9);
  return keep > 0 ? sorted[sorted.length - keep] : Infinity;
}

function classify() {
  const boundary = asGiven() ? 0 : Math.fround(state.boundary), band = Math.fround(state.band), zero = asGiven();
  for (let r = 0; r < R; r++) {
    let negative = 0, scored = 0;
    for (let t = offsets[r], end = offsets[r + 1]; t < end; t++) {
      const s = score[t];
      let c = 2;
      if (isScored(t)) {
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
