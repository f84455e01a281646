// Draws the report from the data that stands in the page. Whatever comes from outside is put in as text, never as
// markup; plotly draws a figure's texts as markup of its own, so these are escaped.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = data.candidates;
  const reference = data.reference;
  const count = all.number.length;
  const byId = (id) => document.getElementById(id);
  const config = { responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "" };
  const buttons = ["sendChartToCloud", "select2d", "lasso2d", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "autoScale2d"];
  const MOST_DRAWN = { columns: 120, rows: 80 };
  const FIRST_ROWS = 100;
  const FOLLOW_MS = 3000;

  // What can be an axis. Bars are 95 % intervals; that of a latency is the paired ratio's, carried over in proportion.
  const AXES = {
    accuracy: {
      title: "accuracy, %",
      of: (s, i) => s.accuracy[i],
      span: (s, i) => [s.accuracy_low[i], s.accuracy_high[i]],
    },
    latency: {
      title: "latency, ms (median)",
      of: (s, i) => s.ms[i],
      span: (s, i) => [(s.ms[i] * s.ratio_low[i]) / s.ratio[i], (s.ms[i] * s.ratio_high[i]) / s.ratio[i]],
    },
    speed: {
      title: "times faster",
      of: (s, i) => 1 / s.ratio[i],
      span: (s, i) => [1 / s.ratio_high[i], 1 / s.ratio_low[i]],
    },
    size: { title: "size, MB", of: (s, i) => s.size[i] },
    smaller: { title: "times smaller", of: (s, i) => reference.size[0] / s.size[i] },
    memory: { title: "memory, MB", of: (s, i) => s.memory[i] },
    divergence: { title: "divergence, nats", of: (s, i) => s.divergence[i] },
    loss: { title: "loss", of: (s, i) => s.loss[i] },
  };
  // Said with all their digits, so that `pick` takes the same points by them; of a drop it takes none below 0.
  const LIMITS = {
    drop: { of: (s, i) => Math.max(0, reference.accuracy[0] - s.accuracy[i]), words: (v) => `${Math.ceil(1000 * v - 1e-6) / 1000} points` },
    latency: { of: (s, i) => s.ms[i], words: (v) => `${v} ms` },
    size: { of: (s, i) => s.size[i], words: (v) => `${v} MB` },
  };
  // Axes by objective, in the order in which a picture that is judged by them has them.
  const COSTS = { latency: "latency", size_bytes: "size", peak_memory: "memory" };
  const QUALITIES = { accuracy: "accuracy", divergence: "divergence", loss: "loss" };

  const measured = range(count).filter((i) => all.accuracy[i] !== null);
  const front = measured.filter((i) => all.front[i]);
  const judgedBy = (axes) => Object.keys(axes).filter((name) => data.objectives.includes(name)).map((name) => axes[name]);
  const [across, through] = new Set([...judgedBy(COSTS), ...Object.values(COSTS)]);
  const [up] = [...judgedBy(QUALITIES), "accuracy"];
  const view = { x: across, y: up, z: through, log: false, solid: false, only: false, limits: {}, selected: null };

  function range(n) {
    return Array.from({ length: n }, (_, i) => i);
  }
  function short(value) {
    return value >= 1 ? value.toFixed(1) : String(Number(value.toPrecision(2)));
  }
  function escaped(text) {
    return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }
  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }
  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  }
  function planOf(i) {
    return all.plan[i].map((n) => data.parts[n]).join("; ");
  }
  function folded(text, width) {
    const lines = [""];
    for (const word of text.split(" ")) {
      const last = lines[lines.length - 1];
      if (last && last.length + word.length >= width) lines.push(word);
      else lines[lines.length - 1] = last ? `${last} ${word}` : word;
    }
    return lines;
  }

  // Words about a point.
  function faster(s, i) {
    const said = s.ratio[i] <= 1 ? "faster" : "as fast";
    return `${(1 / s.ratio[i]).toFixed(2)}x ${said} (${(1 / s.ratio_high[i]).toFixed(2)} to ${(1 / s.ratio_low[i]).toFixed(2)})`;
  }
  function smaller(s, i) {
    const factor = reference.size[0] / s.size[i];
    return factor >= 1 ? `${factor.toFixed(1)}x smaller` : `${(1 / factor).toFixed(1)}x larger`;
  }
  function percent(s, i) {
    return `${s.accuracy[i].toFixed(1)} % (${s.accuracy_low[i].toFixed(1)} to ${s.accuracy_high[i].toFixed(1)})`;
  }
  function hover(s, i, name) {
    const lines = [`<b>${escaped(name)}</b>`];
    if (s === all) lines.push(...folded(planOf(i), 44).map(escaped));
    if (s === all && !all.feasible[i]) lines.push("breaks a constraint");
    lines.push(`accuracy ${percent(s, i)}`);
    lines.push(s === reference ? `${short(s.size[i])} MB` : `${short(s.size[i])} MB (${smaller(s, i)})`);
    lines.push(s === reference ? `${short(s.ms[i])} ms` : `${short(s.ms[i])} ms, ${faster(s, i)}`);
    return lines.join("<br>");
  }

  // Limits.
  function within(s) {
    return (i) => Object.entries(view.limits).every(([name, limit]) => LIMITS[name].of(s, i) <= limit + 1e-9);
  }
  function keeps(i) {
    return within(all)(i);
  }
  function steps(limit) {
    return [...new Set(front.map((i) => limit.of(all, i)))].sort((a, b) => a - b);
  }
  function limited() {
    return Object.keys(view.limits).length > 0;
  }
  function prepareLimits() {
    for (const [name, limit] of Object.entries(LIMITS)) {
      const values = steps(limit);
      const slider = byId(`limit-${name}`);
      const said = byId(`limit-${name}-value`);
      // One step further than the largest value: no limit.
      slider.max = values.length;
      slider.value = values.length;
      slider.disabled = values.length === 0;
      const changed = () => {
        const at = Number(slider.value);
        if (at < values.length) view.limits[name] = values[at];
        else delete view.limits[name];
        const words = at < values.length ? limit.words(values[at]) : "any";
        said.textContent = words;
        slider.setAttribute("aria-valuetext", words);
        draw();
      };
      slider.addEventListener("input", changed);
      said.textContent = "any";
      slider.setAttribute("aria-valuetext", "any");
    }
    byId("only").addEventListener("change", (event) => {
      view.only = event.target.checked;
      draw();
    });
    byId("reset").addEventListener("click", () => {
      for (const name of Object.keys(LIMITS)) {
        const slider = byId(`limit-${name}`);
        slider.value = slider.max;
        slider.dispatchEvent(new Event("input"));
      }
    });
  }
  function sayCount() {
    const kept = front.filter(keeps);
    const others = measured.filter((i) => keeps(i) && all.feasible[i]);
    const place = byId("count");
    const broken = measured.filter((i) => !all.feasible[i]).length;
    const words = limited()
      ? `${kept.length} of ${front.length} points of the front and ${others.length} of ${measured.length} candidates keep to the limits.`
      : `${front.length} points of the front, ${measured.length} measured candidates` +
        (broken ? `, of which ${broken} break a constraint of the run file.` : ".");
    // Filled anew only where something changed, so that the keyboard's focus stays on its buttons.
    const shown = `${words} ${kept.join()}`;
    if (place.dataset.shown === shown) return;
    place.dataset.shown = shown;
    place.replaceChildren(words);
    if (!kept.length) return;
    for (const [name, ranked] of Object.entries(data.best)) {
      const found = ranked.find(keeps);
      const button = make("button", { type: "button", className: "link", id: `best-${name}`, textContent: `${name}: trial ${all.number[found]}` });
      button.addEventListener("click", () => select(found, true));
      place.append(" ", button);
    }
  }

  // The picture.
  function thinned(indices) {
    const x = AXES[view.x], y = AXES[view.y];
    const scaled = view.log ? Math.log : (value) => value;
    if (indices.length < 1000) return { drawn: indices, under: 0 };
    const xs = indices.map((i) => scaled(x.of(all, i))), ys = indices.map((i) => y.of(all, i));
    const [left, right, low, high] = [Math.min, Math.max].flatMap((f) => [xs.reduce((a, b) => f(a, b))])
      .concat([Math.min, Math.max].map((f) => ys.reduce((a, b) => f(a, b))));
    const cells = new Map();
    indices.forEach((i, n) => {
      const column = Math.floor((MOST_DRAWN.columns * (xs[n] - left)) / (right - left || 1));
      const row = Math.floor((MOST_DRAWN.rows * (ys[n] - low)) / (high - low || 1));
      const key = column * 1000 + row;
      if (!cells.has(key)) cells.set(key, i);
    });
    return { drawn: [...cells.values()], under: indices.length - cells.size };
  }
  function placed(i) {
    // Whether the axes can show a candidate.
    const shown = view.solid ? [view.x, view.y, view.z] : [view.x, view.y];
    return shown.every((axis) => {
      const value = AXES[axis].of(all, i);
      return value !== null && !(axis === view.x && view.log && value <= 0);
    });
  }
  function trace(name, s, indices, extra) {
    const x = AXES[view.x], y = AXES[view.y], z = AXES[view.z];
    const found = {
      name,
      mode: "markers",
      x: indices.map((i) => x.of(s, i)),
      y: indices.map((i) => y.of(s, i)),
      customdata: s === all ? indices : indices.map(() => null),
      hovertext: indices.map((i) => hover(s, i, s === all ? `trial ${all.number[i]}` : name)),
      hoverinfo: "text",
      type: view.solid ? "scatter3d" : "scatter",
      ...extra,
    };
    if (view.solid) found.z = indices.map((i) => z.of(s, i));
    return found;
  }
  function bars(axis, indices) {
    const of = AXES[axis];
    if (!of.span) return undefined;
    const spans = indices.map((i) => of.span(all, i)), values = indices.map((i) => of.of(all, i));
    return {
      type: "data",
      symmetric: false,
      thickness: 1,
      width: 3,
      color: colour("bars"),
      array: spans.map(([, high], n) => Math.max(0, high - values[n])),
      arrayminus: spans.map(([low], n) => Math.max(0, values[n] - low)),
    };
  }
  function frontTrace(indices) {
    const z = AXES[view.z];
    const values = indices.map((i) => z.of(all, i));
    const every = front.map((i) => z.of(all, i));
    const [low, high] = [Math.min(...every), Math.max(...every)];
    const pad = low === high ? 0.5 : 0; // without a span of its own a colour bar has no ticks
    return trace("Pareto front", all, indices, {
      marker: {
        color: values,
        cmin: low - pad,
        cmax: high + pad,
        colorscale: "Viridis",
        size: view.solid ? 6 : indices.map((i) => 6 + 14 * Math.sqrt((z.of(all, i) - low) / (high - low || 1))),
        opacity: view.solid ? 1 : indices.map((i) => (keeps(i) ? 0.95 : 0.2)),
        line: { width: 1, color: colour("text") },
        colorbar: {
          title: { text: z.title, side: "top" },
          orientation: "h",
          y: -0.22,
          yanchor: "top",
          thickness: 12,
          outlinewidth: 0,
        },
      },
      error_x: bars(view.x, indices),
      error_y: bars(view.y, indices),
      error_z: view.solid ? bars(view.z, indices) : undefined,
    });
  }
  function edge(indices) {
    // The points that are best in this picture's two axes alone; the others are on the front by a third.
    const sign = { accuracy: -1, speed: -1, smaller: -1 };
    const x = (i) => (sign[view.x] || 1) * AXES[view.x].of(all, i), y = (i) => (sign[view.y] || 1) * AXES[view.y].of(all, i);
    const best = indices
      .filter((i) => !indices.some((j) => x(j) <= x(i) && y(j) <= y(i) && (x(j) < x(i) || y(j) < y(i))))
      .sort((a, b) => x(a) - x(b));
    return {
      name: "edge",
      type: "scatter",
      mode: "lines",
      x: best.map((i) => AXES[view.x].of(all, i)),
      y: best.map((i) => AXES[view.y].of(all, i)),
      line: { width: 1.5, color: colour("soft") },
      hoverinfo: "skip",
      showlegend: false,
      zorder: -1,
    };
  }
  function traces() {
    const wanted = view.only ? measured.filter(keeps) : measured;
    const shown = wanted.filter(placed);
    const rest = shown.filter((i) => !all.front[i]);
    const ladder = rest.filter((i) => all.origin[i] === "uniform" && all.feasible[i]);
    const others = rest.filter((i) => all.origin[i] !== "uniform" && all.feasible[i]);
    const broken = rest.filter((i) => !all.feasible[i]);
    const drawnOthers = thinned(others), drawnBroken = thinned(broken);
    const found = [];
    const plain = { size: 6, color: colour("faint"), line: { width: 1, color: colour("faint") } };
    if (drawnOthers.drawn.length) found.push(trace("other candidates", all, drawnOthers.drawn, { marker: plain }));
    if (drawnBroken.drawn.length) {
      const cross = { size: 6, symbol: view.solid ? "x" : "x-thin", color: colour("faint"), line: { width: 1.5, color: colour("faint") } };
      found.push(trace("breaks a constraint", all, drawnBroken.drawn, { marker: cross }));
    }
    const random = range(data.random.accuracy.length);
    const drawnRandom = view.only ? random.filter(within(data.random)) : random;
    if (drawnRandom.length) {
      const diamond = { size: 7, symbol: "diamond-open", color: colour("random"), line: { width: 1.5, color: colour("random") } };
      found.push(trace("random search's front", data.random, drawnRandom, { marker: diamond }));
    }
    if (ladder.length) {
      const square = { size: 8, symbol: "square-open", color: colour("ladder"), line: { width: 1.5, color: colour("ladder") } };
      found.push(trace("uniform ladder", all, ladder, { marker: square }));
    }
    const kept = shown.filter((i) => all.front[i]);
    if (kept.length) found.push(frontTrace(kept));
    const star = { symbol: view.solid ? "diamond" : "star", size: view.solid ? 7 : 15, color: "#d1495b", line: { width: 1, color: colour("text") } };
    found.push(trace("uncompressed reference", reference, [0], { marker: star }));
    if (kept.length && !view.solid) found.push(edge(kept));
    if (view.selected !== null && all.accuracy[view.selected] !== null) {
      const ring = { symbol: "circle-open", size: view.solid ? 12 : 24, color: colour("mark"), line: { width: 3, color: colour("mark") } };
      found.push({ ...trace("selected", all, [view.selected], { marker: ring }), hoverinfo: "skip", showlegend: false });
    }
    return { found, under: drawnOthers.under + drawnBroken.under, lacking: wanted.length - shown.length };
  }
  function dressed(layout) {
    const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true };
    const both = { ...layout, template: "none", paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
    both.font = { color: colour("text"), family: "system-ui, sans-serif", size: 13 };
    both.xaxis = { ...axis, ...layout.xaxis };
    both.yaxis = { ...axis, ...layout.yaxis };
    both.hoverlabel = { align: "left", bgcolor: colour("page"), bordercolor: colour("line"), font: { color: colour("text") } };
    both.modebar = { remove: buttons, color: colour("soft"), bgcolor: "rgba(0,0,0,0)" };
    both.legend = { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", itemsizing: "constant", ...layout.legend };
    both.margin = { l: 56, r: 16, t: 40, b: 24 };
    return both;
  }
  function draw() {
    const { found, under, lacking } = traces();
    // Labels at 1, 2 and 5 of each decade; on less than one there may be none of these.
    const shown = found.flatMap(({ x }) => x).filter((value) => value > 0);
    const [least, most] = [Math.min, Math.max].map((f) => shown.reduce((a, b) => f(a, b), shown[0]));
    const dtick = view.log && most >= 10 * least ? "D2" : undefined;
    const titled = (name) => ({ title: { text: AXES[name].title }, gridcolor: colour("line"), color: colour("text") });
    const type = view.log ? "log" : "linear";
    const layout = dressed({
      height: 560,
      uirevision: `${view.x} ${view.y} ${view.z} ${view.log} ${view.solid}`,
      xaxis: { title: { text: AXES[view.x].title }, type, dtick, rangemode: view.x === "accuracy" ? "normal" : "tozero" },
      yaxis: { title: { text: AXES[view.y].title }, rangemode: "normal" },
      scene: { xaxis: { ...titled(view.x), type }, yaxis: titled(view.y), zaxis: titled(view.z) },
    });
    byId("thinned").textContent =
      (under ? ` ${under} candidates off the front lie under others that are drawn, and are left out.` : "") +
      (lacking ? ` ${lacking} candidates have no such number, or none that an axis can show.` : "");
    const plot = byId("figure-front");
    Plotly.react(plot, found, layout, config);
    if (!plot.dataset.ready) {
      plot.dataset.ready = "1";
      plot.on("plotly_click", (event) => {
        const index = event.points[0] && event.points[0].customdata;
        if (Number.isInteger(index)) select(index);
      });
    }
    sayCount();
  }
  function prepareAxes() {
    // What no candidate has measured is no axis; before there is any, those that are shown are.
    const shown = [view.x, view.y, view.z];
    const known = Object.keys(AXES).filter(
      (name) => shown.includes(name) || !(name in all) || measured.some((i) => all[name][i] !== null),
    );
    for (const axis of ["x", "y", "z"]) {
      const choice = byId(`axis-${axis}`);
      for (const name of known) choice.append(new Option(AXES[name].title, name, name === view[axis], name === view[axis]));
      choice.addEventListener("change", () => {
        view[axis] = choice.value;
        draw();
      });
    }
    // Where the front spans as much, a plain axis leaves most of its points at one end.
    const ends = front.map((i) => AXES[view.x].of(all, i));
    byId("log").checked = view.log = Math.max(...ends) > 8 * Math.min(...ends);
    byId("log").addEventListener("change", (event) => {
      view.log = event.target.checked;
      draw();
    });
    byId("solid").addEventListener("change", (event) => {
      view.solid = event.target.checked;
      draw();
    });
  }

  // One point.
  function select(index, scroll = false) {
    view.selected = index;
    const link = `#trial-${all.number[index]}`;
    if (location.hash !== link) history.replaceState(null, "", link);
    describe(index);
    draw();
    const narrow = byId("detail").getBoundingClientRect().top > window.innerHeight || scroll;
    if (narrow) byId("detail").scrollIntoView({ block: "nearest" });
  }
  function describe(i) {
    const place = byId("detail");
    const kind = all.front[i] ? "on the front" : all.accuracy[i] === null ? all.state[i] : all.feasible[i] ? "not on the front" : "breaks a constraint";
    const parts = [
      make("h3", { id: "chosen", textContent: `Trial ${all.number[i]}`, tabIndex: -1 }),
      make("p", { className: "soft", textContent: `${kind}; proposed by: ${all.origin[i]}` }),
      make("p", { textContent: planOf(i) }),
    ];
    if (all.failure[i]) parts.push(make("p", { className: "failure", textContent: all.failure[i] }));
    if (all.accuracy[i] !== null) parts.push(numbers(i));
    const picture = data.pictures[i];
    if (picture) parts.push(drawnPlan(picture));
    for (const [nth, [better, number, words]] of (data.neighbours[all.number[i]] || []).entries()) {
      const button = make("button", { type: "button", className: "link", id: `near-${nth}`, textContent: `trial ${number}` });
      button.addEventListener("click", () => {
        select(all.number.indexOf(number));
        place.querySelector("h3").focus(); // the button is gone, and the keyboard would start at the top again
      });
      parts.push(make("p", { className: "near" }, `${better}: `, button, ` ${words}`));
    }
    if (all.accuracy[i] !== null) parts.push(command(i));
    place.replaceChildren(...parts);
  }
  function numbers(i) {
    const rows = [
      ["accuracy", percent(all, i)],
      ...(all.drop[i] === null ? [] : [["lost on the same rows", lost(i)]]),
      ["size", `${short(all.size[i])} MB, ${smaller(all, i)}`],
      ["latency", `${short(all.ms[i])} ms median, ${short(all.p90[i])} ms 90th percentile`],
      ["against the reference", faster(all, i)],
      ["scored in", `${short(all.seconds[i])} s`],
    ];
    if (all.memory[i] !== null) rows.splice(-2, 0, ["memory", `${short(all.memory[i])} MB`]);
    if (all.divergence[i] !== null) rows.splice(2, 0, ["divergence", `${Number(all.divergence[i].toPrecision(2))} nats`]);
    return make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
  }
  function lost(i) {
    return `${all.drop[i].toFixed(1)} points (${all.drop_low[i].toFixed(1)} to ${all.drop_high[i].toFixed(1)})`;
  }
  function bitsOf(words) {
    return Number(words.slice(1).split("a")[0]);
  }
  function heat(text, share) {
    const cell = make("td", { textContent: text });
    // Never the full colour, so that the page's text can be read on it.
    cell.style.setProperty("--share", `${Math.round(70 * Math.min(1, Math.max(0, share)))}%`);
    cell.className = "heat";
    return cell;
  }
  function drawnPlan([hidden, rows, embedding, head, tokens, runs, blocks]) {
    const full = data.shape;
    const ranked = (rank, outer) => (rank ? (rank * (outer + hidden)) / (outer * hidden) : 1);
    const ofBits = (words) => Math.log2(bitsOf(words)) / 5;
    const lines = blocks.map((number, place) => {
      const [heads, neurons, attentionRank, ffnRank, attentionBits, ffnBits] = data.blocks[number];
      return make(
        "tr",
        {},
        make("th", { scope: "row", textContent: String(place) }),
        heat(String(heads), heads / full.heads),
        heat(attentionRank ? String(attentionRank) : "full", ranked(attentionRank, heads * full.head_size)),
        heat(attentionBits, ofBits(attentionBits)),
        heat(String(neurons), neurons / full.neurons),
        heat(ffnRank ? String(ffnRank) : "full", ranked(ffnRank, neurons)),
        heat(ffnBits, ofBits(ffnBits)),
      );
    });
    const names = ["block", "heads", "rank", "bits", "neurons", "rank", "bits"];
    const groups = make("tr", {}, make("td"), make("th", { colSpan: 3, textContent: "attention" }), make("th", { colSpan: 3, textContent: "FFN" }));
    const heading = make("tr", {}, ...names.map((name) => make("th", { scope: "col", textContent: name })));
    const said = [
      `${blocks.length * runs} of ${full.blocks} blocks` + (runs > 1 ? `, each stored one run ${runs} times` : ""),
      `width ${hidden} of ${full.hidden}`,
      `embeddings ${embedding}` + (rows < full.rows ? `, ${rows} of ${full.rows} rows` : ""),
      `head ${head}`,
    ];
    if (tokens) said.push(`first ${tokens} tokens`);
    const table = make("table", { className: "plan" }, make("thead", {}, groups, heading), make("tbody", {}, ...lines));
    table.setAttribute("aria-label", "What is kept of each block");
    return make("div", {}, make("div", { className: "scroll" }, table), make("p", { className: "soft", textContent: `${said.join("; ")}. The stronger a colour, the more is left of the uncompressed model.` }));
  }
  function command(i) {
    const text = data.command.join(all.number[i]);
    const field = make("input", { readOnly: true, value: text, id: "command" });
    field.setAttribute("aria-label", "Command that exports this point");
    const button = make("button", { type: "button", id: "copy", textContent: "Copy" });
    button.addEventListener("click", async () => {
      let copied = true;
      try {
        await navigator.clipboard.writeText(text);
      } catch {
        field.select();
        copied = document.execCommand("copy");
      }
      button.textContent = copied ? "Copied" : "Selected";
    });
    return make("div", { className: "command" }, field, button);
  }

  // Candidates by what their plans are on the whole.
  function drawParallel() {
    const place = byId("figure-parallel");
    const usable = measured.filter((i) => all.feasible[i]);
    if (!place || usable.length < 2) return;
    if (!document.createElement("canvas").getContext("webgl")) {
      place.textContent = "This picture needs WebGL, which this browser does not offer.";
      return;
    }
    const rest = usable.filter((i) => !all.front[i]);
    const every = Math.max(1, Math.ceil(rest.length / 1500));
    const drawn = rest.filter((_, n) => n % every === 0).concat(front);
    const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
    const blocksOf = (i) => data.pictures[i] && data.pictures[i][6].map((n) => data.blocks[n]);
    const columns = [];
    if (data.shape && drawn.every(blocksOf)) {
      columns.push(["blocks", (i) => blocksOf(i).length * data.pictures[i][5]]);
      columns.push(["heads a block", (i) => mean(blocksOf(i).map((b) => b[0]))]);
      columns.push(["neurons a block", (i) => mean(blocksOf(i).map((b) => b[1]))]);
      columns.push(["bits, mean of sites", (i) => mean(blocksOf(i).flatMap((b) => [bitsOf(b[4]), bitsOf(b[5])]))]);
      columns.push(["bits of embeddings", (i) => bitsOf(data.pictures[i][2])]);
    }
    columns.push(["size, MB", (i) => all.size[i]], ["latency, ms", (i) => all.ms[i]], ["accuracy, %", (i) => all.accuracy[i]]);
    const shown = columns.filter(([, of]) => new Set(drawn.map(of)).size > 1);
    const accuracies = drawn.map((i) => all.accuracy[i]);
    const found = {
      type: "parcoords",
      line: { color: accuracies, colorscale: "Viridis", cmin: Math.min(...accuracies), cmax: Math.max(...accuracies) },
      dimensions: shown.map(([label, of]) => ({ label, values: drawn.map(of).map((value) => Number(value.toPrecision(3))) })),
      labelfont: { color: colour("text"), size: 12 },
      tickfont: { color: colour("text"), size: 11 },
      rangefont: { color: colour("soft"), size: 10 },
      unselected: { line: { color: colour("faint"), opacity: 0.1 } },
    };
    const layout = dressed({ height: 420 });
    layout.margin = { l: 60, r: 40, t: 60, b: 24 };
    Plotly.react(place, [found], layout, config);
  }
  function drawGiven(name) {
    const figure = data.figures[name];
    Plotly.react(byId(`figure-${name}`), figure.data, dressed({ ...figure.layout, template: undefined }), config);
  }

  // Tables.
  function row(i) {
    const score = all.accuracy[i] !== null;
    const state = all.feasible[i] || !score ? all.state[i] : `${all.state[i]}, infeasible`;
    const button = make("button", { type: "button", className: "link", id: `row-${all.number[i]}`, textContent: String(all.number[i]) });
    button.addEventListener("click", () => select(i, true));
    const cells = score
      ? [all.accuracy[i].toFixed(1), short(all.size[i]), all.ratio[i].toFixed(3), short(all.seconds[i])]
      : ["", "", "", ""];
    return make(
      "tr",
      {},
      make("td", { className: "number" }, button),
      make("td", { textContent: state }),
      ...cells.map((textContent) => make("td", { className: "number", textContent })),
      make("td", { className: "words", textContent: all.failure[i] || planOf(i) }),
    );
  }
  function fillTable() {
    const body = byId("candidates");
    const more = byId("more");
    if (!body) return;
    const fill = (most) => body.replaceChildren(...range(Math.min(most, count)).map(row));
    fill(FIRST_ROWS);
    if (count <= FIRST_ROWS) return;
    more.hidden = false;
    more.textContent = `Show all ${count}`;
    more.addEventListener("click", () => {
      fill(count);
      body.querySelectorAll("button")[FIRST_ROWS].focus(); // what was pressed goes
      more.hidden = true;
    });
  }

  // A page that is served follows the search: where there is something new it loads itself anew, as it was left.
  const KEPT = `report ${data.command[0]}`; // another study's page may be served at the same place
  const scrolled = () => document.querySelectorAll(".scroll");
  function restore() {
    const kept = data.version ? JSON.parse(sessionStorage.getItem(KEPT) || "null") : null;
    if (!kept) return;
    sessionStorage.removeItem(KEPT);
    for (const [id, value] of Object.entries(kept.fields)) {
      const field = byId(id);
      if (field.type === "checkbox") field.checked = value;
      else if ([...field.options].some((option) => option.value === value)) field.value = value;
      field.dispatchEvent(new Event(field.type === "range" ? "input" : "change"));
    }
    for (const [name, limit] of Object.entries(kept.limits)) {
      // Its value, as what the slider's steps stand for has changed.
      const values = steps(LIMITS[name]);
      const slider = byId(`limit-${name}`);
      slider.value = values.filter((value) => value <= limit + 1e-9).length - 1;
      slider.dispatchEvent(new Event("input"));
      // What was asked for stands, and not the step that is nearest to it.
      view.limits[name] = limit;
      byId(`limit-${name}-value`).textContent = LIMITS[name].words(limit);
      slider.setAttribute("aria-valuetext", LIMITS[name].words(limit));
    }
    draw();
    const more = byId("more");
    if (kept.whole && more && !more.hidden) more.click();
    window.scrollTo(0, kept.scroll);
    scrolled().forEach((place, n) => Object.assign(place, { scrollTop: (kept.within[n] || [0])[0], scrollLeft: (kept.within[n] || [0, 0])[1] }));
    const focused = kept.focus && document.querySelector(kept.focus);
    if (focused) focused.focus({ preventScroll: true });
    else document.activeElement.blur();
  }
  function focusOf() {
    // What leads to the element that has the keyboard, in the page as it will be.
    const at = document.activeElement;
    if (at.id) return `#${CSS.escape(at.id)}`;
    return at.dataset.trial ? `[data-trial="${CSS.escape(at.dataset.trial)}"]` : null;
  }
  function follow() {
    if (!data.version) return;
    const standing = document.querySelector(".standing");
    const said = standing && standing.textContent;
    setInterval(async () => {
      if (document.hidden) return;
      try {
        const answer = await fetch("version", { cache: "no-store" });
        if (standing) standing.textContent = said;
        if (!answer.ok || (await answer.text()) === data.version) return;
      } catch {
        if (standing) standing.textContent = `${said} Nobody serves it at the moment, so that it stands still.`;
        return;
      }
      const fields = {};
      for (const id of ["axis-x", "axis-y", "axis-z"]) fields[id] = byId(id).value;
      for (const id of ["log", "solid", "only"]) fields[id] = byId(id).checked;
      const more = byId("more");
      const kept = { fields, limits: view.limits, scroll: window.scrollY, focus: focusOf(), whole: Boolean(more && more.hidden) };
      kept.within = [...scrolled()].map((place) => [place.scrollTop, place.scrollLeft]);
      sessionStorage.setItem(KEPT, JSON.stringify(kept));
      location.reload();
    }, FOLLOW_MS);
  }

  // Pictures further down are drawn when they are first seen: the page is there earlier.
  const drawn = [draw];
  function whenSeen(name, drawing) {
    const place = byId(`figure-${name}`);
    if (!place) return;
    const watch = new IntersectionObserver(
      (entries) => {
        if (!entries.some((entry) => entry.isIntersecting)) return;
        watch.disconnect();
        drawn.push(drawing);
        drawing();
      },
      { rootMargin: "400px" },
    );
    watch.observe(place);
  }
  for (const button of document.querySelectorAll("[data-trial]")) {
    const index = all.number.indexOf(Number(button.dataset.trial));
    button.addEventListener("click", () => select(index, true));
  }
  const linked = all.number.indexOf(Number(location.hash.replace("#trial-", "") || NaN));
  const first = document.querySelector("[data-trial]");
  if (linked >= 0) view.selected = linked;
  else if (first) view.selected = all.number.indexOf(Number(first.dataset.trial));
  prepareAxes();
  prepareLimits();
  fillTable();
  if (view.selected !== null) describe(view.selected);
  draw();
  restore();
  whenSeen("parallel", drawParallel);
  for (const name of Object.keys(data.figures)) whenSeen(name, () => drawGiven(name));
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", () => drawn.forEach((drawing) => drawing()));
  follow();
  document.documentElement.dataset.ready = String(Math.round(performance.now())); // ms since it was asked for
})();
