// Judged rows: what was marked, how well the score finds it, and the file that keeps it.
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
