// The panel: shares, words, the histogram, and the lines of the YAML file.
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
  const often = new Uint32Array(words.names.length);
  for (let t = 0, last = -1; t < T; t++) {
    if (flags[t] & WORD) last = -1;
    const word = words.of[t];
    if (word >= 0 && classOf[t] < 0 && last !== word) often[last = word]++;
  }
  const best = [];
  let floor = 0;
  often.forEach((count, word) => {
    if (count <= floor) return;
    best.push(word);
    if (best.length > 400) {
      best.sort((a, b) => often[b] - often[a]).length = 20;
      floor = often[best[19]];
    }
  });
  best.sort((a, b) => often[b] - often[a]).length = Math.min(best.length, 20);
  fillTable("words", best.map((word) => {
    const button = element("button", { type: "button", class: "link", title: "show rows with this word" });
    button.append(element("bdi", {}, visible(words.names[word].slice(0, 40))));
    button.onclick = () => { $("search").value = words.names[word]; search(); };
    return [button, number(often[word]), number(words.seen[word]), percent(often[word] / words.seen[word])];
  }));
}

const place = (value) => (300 * (Math.min(Math.max(value, low), high) - low)) / (high - low);
let bins = null;
function findBins() {
  const all = new Float64Array(BINS), right = new Float64Array(BINS / 4), wrong = new Float64Array(BINS / 4);
  for (let t = 0; t < T; t++) {
    if (!isScored(t)) continue;
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
  const name = D.names[state.score];
  const lines = [name ? `score: ${name}` : `score: given  # with the column ${state.score} called token_scores`];
  lines.push(`score_pooling: ${state.pooling}`);
  if (state.score === "influence") lines.push(`score_base_weight: ${state.base}`);
  if (state.lookahead) lines.push(`score_lookahead: ${state.lookahead}`);
  if (state.pooling === "row" && state.worst !== null) lines.push(`score_row_worst: ${state.worst}`);
  lines.push(state.share === null ? `negative_threshold: ${-state.boundary || 0}` : `positive_fraction: ${state.share}`);
  lines.push(`neutral_band: ${state.band}`);
  return lines.join("\n");
}
