// What mouse, keyboard and controls do; this file comes last and starts the page.
const menu = $("menu");
const picked = () => (cursor < 0 ? null : wholeWords(Math.min(cursor, anchor), Math.max(cursor, anchor) + 1));
function act(weight) {
  const words = picked();
  if (words) mark(...words, weight);
  menu.hidden = true;
  getSelection().removeAllRanges();
}
/** The first and last token of a selection, whose ends may lie in the spaces between tokens. */
function pick(range) {
  const at = (node, offset) => node.nodeType === 3 ? node : node.childNodes[offset] || node;
  const own = (node) => (node.nodeType === 3 ? node.parentElement : node).closest("[data-t]");
  const from = at(range.startContainer, range.startOffset), to = at(range.endContainer, range.endOffset);
  const first = own(from) || from.nextElementSibling, last = own(to) || to.previousElementSibling;
  if (first?.dataset.t === undefined || last?.dataset.t === undefined) return null;
  const ends = [+first.dataset.t, +last.dataset.t];
  if (own(to) && range.endOffset === 0 && ends[1] > ends[0]) ends[1]--;
  return ends[0] <= ends[1] ? ends : null;
}
function offerMenu() {
  const selection = getSelection();
  if (selection.isCollapsed || !selection.rangeCount) { menu.hidden = true; return; }
  const range = selection.getRangeAt(0), ends = pick(range);
  if (!ends || rowOf(ends[0]) !== rowOf(ends[1])) return;
  [anchor, cursor] = ends;
  refresh();
  const box = range.getBoundingClientRect();
  menu.hidden = false;
  menu.style.left = `${Math.max(4, Math.min(box.left, innerWidth - menu.offsetWidth - 4))}px`;
  menu.style.top = `${Math.max(4, box.top - menu.offsetHeight - 6)}px`;
  tip.hidden = true;
}
document.addEventListener("pointerup", (event) => menu.contains(event.target) || setTimeout(offerMenu));
let selecting = 0; // a finger moves the handles of a selection without any pointer event
if (matchMedia("(pointer: coarse)").matches)
  document.addEventListener("selectionchange", () => { clearTimeout(selecting); selecting = setTimeout(offerMenu, 300); });
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
    if (event.ctrlKey) while (t > itemStart[i] && t < itemEnd(i) - 1 && !(flags[t] & WORD)) t += step;
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
  state.share = null, state.boundary = rounded(value);
  showBoundary(rest);
}
function setShare(value, rest) {
  state.share = Math.min(1, Math.max(0, value)), state.boundary = boundaryAt(state.share);
  showBoundary(rest);
}
function showBoundary(rest) {
  const write = (id, value) => { if (document.activeElement !== $(id) || rest) $(id).value = value; };
  $("boundary").value = state.boundary;
  write("boundary-number", Number.isFinite(state.boundary) ? rounded(state.boundary) : "");
  write("share", state.share === null ? "" : rounded(100 * (1 - state.share)));
  update(rest);
}
function setBand(value, rest) {
  state.band = Math.max(0, rounded(value));
  $("band").value = state.band;
  if (document.activeElement !== $("band-number") || rest) $("band-number").value = state.band;
  update(rest);
}
function setScore() {
  findScore();
  const step = 10 ** Math.floor(Math.log10((high - low) / 500));
  for (const [id, from, to] of [["boundary", low, high], ["band", 0, (high - low) / 4]])
    Object.assign($(id), { min: rounded(from), max: rounded(to), step }), ($(`${id}-number`).step = step);
  for (const id of ["boundary", "boundary-number", "band", "band-number", "share", "pooling"]) $(id).disabled = asGiven();
  $("base-box").hidden = state.score !== "influence";
  findBins();
  delete $("histogram").dataset.drawn;
  if (state.share === null) setBoundary(state.boundary, false); else setShare(state.share, false);
}
/** The rule of a run that says nothing but which score. */
function useDefaults() {
  const { score_pooling: pooling, negative_threshold: threshold, positive_fraction: share } = D.defaults[state.score];
  Object.assign(state, { pooling, share, boundary: -threshold });
  $("pooling").value = pooling;
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
const listen = (id, event, action) => $(id).addEventListener(event, action);
listen("score", "change", () => { state.score = $("score").value; useDefaults(); setScore(); choose(); });
listen("pooling", "change", () => { state.pooling = $("pooling").value; setScore(); choose(); });
listen("base", "input", () => { state.base = Number($("base").value) || 0; setScore(); });
listen("base", "change", () => choose());
for (const event of ["input", "change"])
  listen("share", event, () => $("share").value !== "" && setShare(Math.round(1e6 - 1e4 * $("share").value) / 1e6, event === "change"));
for (const [id, set] of [["boundary", setBoundary], ["band", setBand]])
  for (const [field, event] of [[id, "input"], [id, "change"], [`${id}-number`, "input"], [`${id}-number`, "change"]])
    listen(field, event, () => $(field).value !== "" && set(Number($(field).value), event === "change"));
for (const id of ["sort", "only", "facet"]) listen(id, "change", () => { state[id] = $(id).value; choose(); });
listen("search", "input", search);
listen("words-box", "toggle", showWords);
listen("copy", "click", async () => {
  const text = settingsText();
  try { await navigator.clipboard.writeText(text); } catch {
    getSelection().selectAllChildren($("settings"));
    document.execCommand("copy");
  }
  $("copied").textContent = "Copied.";
});
listen("target-use", "click", useTarget);
listen("export", "click", exportMarks);
listen("import", "change", async () => {
  const text = await $("import").files[0].text();
  try {
    marksChanged(importRows(text.split("\n").filter((line) => line.trim()).map((line) => JSON.parse(line))));
  } catch (error) { say(`This is not a judged sample: ${error.message}`); }
  $("import").value = "";
});
listen("forget", "click", () => {
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
$("pooling").value = state.pooling;
loadMarks();
setScore();
setBand(state.band, false);
width = list.clientWidth;
choose();
document.body.dataset.ready = "1";
