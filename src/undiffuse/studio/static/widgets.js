// What the views share: a job's state, fields, canvases, the scrubber, the command, the choice of an image, charts.

import { html } from "htm/preact";
import { useEffect, useId, useRef, useState } from "preact/hooks";
import { follow, post, upload } from "./api.js";
import { decode, draw, save, savePNG, toImageData } from "./pixels.js";

// The job of a view: start(view, content, onEvent), cancel(), and its state for Status.
export function useJob() {
  const [state, setState] = useState({ kind: "idle" });
  const current = useRef(null);
  const update = (mine, change) => current.current === mine && setState((old) => ({ ...old, ...change }));

  async function cancel() {
    const job = current.current;
    if (job?.id && !job.ended) await post(`/api/jobs/${job.id}/cancel`, {}, { keepalive: true }).catch(() => {});
  }
  useEffect(() => {
    addEventListener("pagehide", cancel);  // a page that is loaded again does not wait for its old jobs
    return () => removeEventListener("pagehide", cancel);
  }, []);

  async function start(view, content, onEvent = () => {}) {
    const before = cancel();
    const mine = (current.current = { id: null });
    setState({ kind: "waiting", before: 0, fraction: 0 });
    await before;
    try {
      mine.id = (await post("/api/jobs", { view, ...content })).job;
      await follow(mine.id, (event) => {
        if (current.current !== mine) return;
        if (event.kind === "progress") update(mine, { fraction: event.fraction });
        else if (["waiting", "running", "done", "failed", "cancelled"].includes(event.kind)) {
          mine.ended = !["waiting", "running"].includes(event.kind);
          update(mine, { kind: event.kind, before: event.before ?? 0, error: event.error });
        }
        onEvent(event);
      });
    } catch (error) {
      mine.ended = true;
      update(mine, { kind: "failed", error: error.message });
    }
  }
  const fail = (error) => {
    current.current = { id: null, ended: true };
    setState({ kind: "failed", error });
  };
  return { state, start, cancel, fail, busy: ["waiting", "running"].includes(state.kind) };
}

const STATES = { idle: "", running: "running", done: "done", cancelled: "cancelled", failed: "failed" };

export function Status({ job, what = "progress" }) {
  const { kind, before, fraction, error } = job.state;
  const shown = kind === "waiting" ? (before ? `waiting, ${counted(before, "job")} before this one` : "waiting") : STATES[kind];
  return html`<div class="status">
    <span role="status" aria-live="polite" class="shown">${shown}</span>
    ${job.busy && html`<progress max="1" value=${kind === "running" ? fraction : 0} aria-label=${what}></progress>`}
    ${job.busy && html`<button type="button" onClick=${job.cancel}>Cancel</button>`}
    ${kind === "failed" && html`<p role="alert" class="error">${error}</p>`}
  </div>`;
}

export function Field({ label, hint, children }) {
  return html`<label class="field"><span>${label}</span>${children}${hint && html`<small>${hint}</small>`}</label>`;
}

// What is typed stays as it is until the field is left, also while the page is drawn anew by the events of a job.
export function NumberField({ label, value, onChange, min, max, step = 1, hint }) {
  const [typed, setTyped] = useState(null);
  const input = (e) => {
    setTyped(e.target.value);
    if (e.target.value !== "") onChange(Number(e.target.value));
  };
  return html`<${Field} label=${label} hint=${hint}>
    <input type="number" inputmode="decimal" required value=${typed ?? value} min=${min} max=${max} step=${step}
      onInput=${input} onBlur=${() => setTyped(null)} />
  <//>`;
}

export function SelectField({ label, value, options, onChange }) {
  return html`<${Field} label=${label}>
    <select value=${value} onChange=${(e) => onChange(e.target.value)}>
      ${options.map(([key, name]) => html`<option value=${key} selected=${String(key) === String(value)}>${name}</option>`)}
    </select>
  <//>`;
}

// Label and prompt of a model that takes them; nothing for others.
export function ConditionFields({ run, value, onChange }) {
  return html`
    ${run.classes?.length > 0 && html`<${SelectField} label="Label" value=${value.label ?? ""}
      options=${[["", "none"], ...run.classes.map((name, i) => [i, name])]}
      onChange=${(label) => onChange({ ...value, label: label === "" ? null : Number(label) })} />`}
    ${run.prompts && html`<${Field} label="Prompt">
      <input type="text" maxlength="1000" value=${value.prompt ?? ""} onInput=${(e) => onChange({ ...value, prompt: e.target.value })} />
    <//>`}`;
}

export const conditionOf = (run, value) => ({
  ...(run.classes?.length && value.label != null ? { label: value.label } : {}),
  ...(run.prompts && value.prompt ? { prompt: value.prompt } : {}),
});

export function Frame({ frame, label, range }) {
  const canvas = useRef(null);
  useEffect(() => {
    if (frame) draw(canvas.current, frame, range);
    else canvas.current.width = canvas.current.height = 1;  // clears it
  }, [frame, range]);
  return html`<figure class="frame">
    <canvas ref=${canvas} class=${frame ? (frame.points ? "points" : "") : "empty"} role="img" aria-label=${label} width="1" height="1"></canvas>
    <figcaption>${label}</figcaption>
  </figure>`;
}

// A slider over the frames of all panels, in fractions of the way from the first to the last.
export function Scrubber({ value, onChange, disabled, from = "noise", to = "data" }) {
  const [playing, setPlaying] = useState(false);
  useEffect(() => {
    if (!playing) return undefined;
    const timer = setInterval(() => {
      onChange((old) => {
        const next = Math.min(1, old + 0.02);
        if (next === 1) setPlaying(false);
        return next;
      });
    }, 50);
    return () => clearInterval(timer);
  }, [playing]);
  const toggle = () => {
    if (!playing && value >= 1) onChange(0);
    setPlaying(!playing);
  };
  return html`<div class="scrubber">
    <button type="button" onClick=${toggle} disabled=${disabled} aria-pressed=${playing}>${playing ? "Pause" : "Play"}</button>
    <span aria-hidden="true">${from}</span>
    <input type="range" min="0" max="1" step="0.01" value=${value} disabled=${disabled}
      aria-label=${`From ${from} to ${to}`} aria-valuetext=${`${Math.round(100 * value)} % of the way from ${from} to ${to}`}
      onInput=${(e) => { setPlaying(false); onChange(Number(e.target.value)); }} />
    <span aria-hidden="true">${to}</span>
  </div>`;
}

// Lines break between words, not after the hyphens of a flag.
const words = (text) => text.split(" ").map((word, i) => [i ? " " : "", html`<span>${word}</span>`]);

export function Command({ text, name = "command", files = [] }) {
  const [copied, setCopied] = useState("");
  if (!text) return null;
  const python = text.includes("\n");
  async function copy() {
    try {
      await navigator.clipboard.writeText(text);
      setCopied("copied");
    } catch {
      setCopied("select the text to copy it");
    }
    setTimeout(() => setCopied(""), 2000);
  }
  const file = python ? `${name}.py` : `${name}.sh`;
  return html`<div class="command">
    <h2>${python ? "The same in Python" : "The command for this result"}</h2>
    <pre class=${python ? "code" : ""} tabindex="0" role="group" aria-label="Command text">${python ? text : words(text)}</pre>
    <div class="row">
      <button type="button" onClick=${copy}>Copy</button>
      <button type="button" onClick=${() => save(new Blob([text + "\n"], { type: "text/plain" }), file)}>Save ${file}</button>
      ${files.map(([label, data]) => data && html`<button type="button" onClick=${() => savePNG(data, label)}>Save ${label}</button>`)}
      <span role="status" aria-live="polite">${copied}</span>
    </div>
  </div>`;
}

// Which image: an item of the run's data, or a file that is dropped, pasted or chosen. onPicture gets its pixels.
export function ImageSource({ index, label = "Image", start = 0, onPicture, active }) {
  const [item, setItem] = useState(start);
  const [typed, setTyped] = useState(null);
  const [file, setFile] = useState(null);
  const [picture, setPicture] = useState(null);
  const [over, setOver] = useState(false);
  const job = useJob();
  const id = useId();

  async function show(source) {
    await job.start("picture", { run: index, source }, (event) => {
      if (event.kind !== "picture") return;
      const decoded = decode(event);
      setPicture(decoded);
      onPicture({ source, frame: decoded, data: toImageData(decoded)[0] });
    });
  }
  const showItem = (number) => {
    setFile(null);
    setItem(number);
    show({ item: number });
  };
  async function showFile(chosen) {
    if (!chosen) return;
    setFile(chosen.name || "pasted image");
    try {
      show({ image: await upload(chosen) });
    } catch (error) {
      job.fail(error.message);
    }
  }
  useEffect(() => {
    if (active && !picture) showItem(item);
  }, [active, index]);

  const commit = () => {
    if (typed !== null && typed !== "") showItem(Math.max(0, Math.round(Number(typed))));
    setTyped(null);
  };
  const enter = (e) => {
    if (e.key !== "Enter") return;
    e.preventDefault();  // Enter chooses the item and does not start the job of the view
    commit();
  };
  const drop = (e) => {
    e.preventDefault();
    setOver(false);
    showFile(e.dataTransfer.files[0]);
  };
  return html`<fieldset class=${`source ${over ? "over" : ""}`} onDragOver=${(e) => { e.preventDefault(); setOver(true); }}
      onDragLeave=${() => setOver(false)} onDrop=${drop} onPaste=${(e) => showFile(e.clipboardData.files[0])}>
    <legend>${label}</legend>
    <${Frame} frame=${picture} label=${file ?? `item ${item} of the data`} />
    <div class="choices">
      <${Field} label="Item of the data">
        <input type="number" min="0" step="1" value=${typed ?? item} onInput=${(e) => setTyped(e.target.value)} onBlur=${commit} onKeyDown=${enter} />
      <//>
      <button type="button" onClick=${() => showItem(item + 1)}>Next item</button>
      <label class="field" for=${id}><span>Or your own: drop it here, paste it, or</span>
        <input id=${id} type="file" accept="image/*" onChange=${(e) => showFile(e.target.files[0])} />
      </label>
      ${picture?.changes?.length > 0 && html`<p class="note">${picture.changes.join(", ")}</p>`}
      ${job.state.kind === "failed" && html`<p role="alert" class="error">${job.state.error}</p>`}
    </div>
  </fieldset>`;
}

export const format = (value, digits = 3) => (value == null ? "–" : Number(value).toFixed(digits));

export const counted = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
