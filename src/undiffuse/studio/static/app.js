// The page: which run, which view. Each view that was opened keeps its state while another one is shown.

import { html, render } from "htm/preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { get, token } from "./api.js";
import { Forward, Interpolate, Likelihood } from "./images.js";
import { Inpaint } from "./inpaint.js";
import { Sample } from "./sample.js";
import { Training } from "./training.js";
import { counted } from "./widgets.js";

const VIEWS = [
  { key: "sample", name: "Sample", view: Sample, fits: (run) => !run.error && run.kind !== "other" },
  { key: "forward", name: "Noise", view: Forward, fits: (run) => run.kind === "images" },
  { key: "likelihood", name: "Likelihood", view: Likelihood, fits: (run) => run.kind === "images" && run.likelihood },
  { key: "inpaint", name: "Inpaint", view: Inpaint, fits: (run) => run.kind === "images" },
  { key: "interpolate", name: "Interpolate", view: Interpolate, fits: (run) => run.kind === "images" },
  { key: "training", name: "Training", view: Training, fits: () => true },
];

function App() {
  const [names, setNames] = useState(null);
  const [runs, setRuns] = useState({});
  const [error, setError] = useState("");
  const [index, setIndex] = useState(0);
  const [view, setView] = useState("sample");
  const [opened, setOpened] = useState({});
  const tabs = useRef({});

  const failed = (problem) => setError(problem.message);
  useEffect(() => {
    if (!token) setError("This address has no token. Open the whole address that undiffuse studio printed.");
    else get("/api/state").then(setNames, failed);
  }, []);
  useEffect(() => {
    if (token && !runs[index]) get(`/api/runs/${index}`).then((run) => setRuns((old) => ({ ...old, [index]: run })), failed);
  }, [index]);
  if (error) return html`<main><h1>undiffuse studio</h1><p role="alert" class="error">${error}</p></main>`;
  if (!names) return html`<p class="loading">Loading …</p>`;

  const run = runs[index];
  const fitting = run ? VIEWS.filter((one) => one.fits(run)) : [];
  const current = fitting.some((one) => one.key === view) ? view : fitting[0]?.key;
  const visited = new Set([...(opened[index] ?? []), current]);
  function open(key, focus = false) {
    setOpened({ ...opened, [index]: [...visited, key] });
    setView(key);
    if (focus) tabs.current[key]?.focus();
  }
  const onKey = (e) => {
    const at = fitting.findIndex((one) => one.key === current);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: fitting.length - 1 }[e.key];
    if (to === undefined) return;
    e.preventDefault();
    open(fitting[(to + fitting.length) % fitting.length].key, true);
  };
  const shape = run?.shape ? `${run.data}, ${run.shape.length > 1 ? run.shape.join(" × ") : counted(run.shape[0], "number")}` : "";
  return html`
    <header>
      <h1>undiffuse studio</h1>
      <label class="field"><span>Run</span>
        <select value=${index} onChange=${(e) => setIndex(Number(e.target.value))}>
          ${names.runs.map((path, i) => html`<option value=${i} selected=${i === index}>${path}</option>`)}
        </select>
      </label>
      <span class="note">${shape}</span>
    </header>
    ${run ? null : html`<p class="loading" role="status">Loading the model …</p>`}
    ${run && html`<nav aria-label="Views"><div role="tablist" aria-label="Views" onKeyDown=${onKey}>
      ${fitting.map((one) => html`<button type="button" role="tab" id=${`tab-${one.key}`} key=${one.key}
        ref=${(node) => (tabs.current[one.key] = node)} aria-selected=${one.key === current}
        aria-controls=${`view-${one.key}`} tabindex=${one.key === current ? 0 : -1} onClick=${() => open(one.key)}>${one.name}</button>`)}
    </div></nav>`}
    <main>
      ${run?.error && html`<p role="alert" class="error">${run.error}</p>`}
      ${fitting.map((one) => html`<div key=${`${index}-${one.key}`} role="tabpanel" id=${`view-${one.key}`}
        aria-labelledby=${`tab-${one.key}`} hidden=${one.key !== current}>
        ${visited.has(one.key) && html`<${one.view} run=${run} index=${index} names=${names} active=${one.key === current} />`}
      </div>`)}
    </main>`;
}

render(html`<${App} />`, document.getElementById("app"));
