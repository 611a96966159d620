// The rows in view, and what a token says of itself.
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
    if (word && word !== shown) text.append(shown.slice(0, shown.length - word.length)); // spaces are not coloured
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
    for (const name of D.scores) if (!name.endsWith("_logps") && name !== "weights") lines.push([name, fixed(scoreAlone(name)(t), 3)]);
  if (isScored(t) && !asGiven() && state.pooling !== "token") lines.push([`${state.score} of its ${state.pooling.replace("_sum", "")}`, fixed(score[t], 3)]);
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
