// Requests to the server of this page. The token comes from the address that `undiffuse studio` printed; the part after
// the # is never sent, so every request carries it in a header.

const KEY = "undiffuse-studio-token";
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) sessionStorage.setItem(KEY, given);
export const token = given ?? sessionStorage.getItem(KEY) ?? "";

const RETRIES = 5;

export async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, "X-Studio-Token": token } });
  } catch {
    throw new Error("The server does not answer. Is undiffuse studio still running?");
  }
  if (!response.ok) {
    const answer = await response.json().catch(() => ({}));
    throw new Error(answer.error ?? `The server answered ${response.status}.`);
  }
  return response;
}

export const get = async (path) => (await request(path)).json();

export async function post(path, content, options = {}) {
  const headers = { "Content-Type": "application/json" };
  return (await request(path, { ...options, method: "POST", headers, body: JSON.stringify(content) })).json();
}

export async function upload(file) {
  const headers = { "Content-Type": "application/octet-stream" };
  return (await (await request("/api/images", { method: "POST", headers, body: file })).json()).image;
}

// Starts a job and calls onEvent for each of its events, until the last one. A stream that breaks is opened again.
export async function follow(id, onEvent, signal) {
  let last = -1;
  for (let tries = 0; tries <= RETRIES; tries++) {
    const headers = last < 0 ? {} : { "Last-Event-ID": String(last) };
    try {
      const response = await request(`/api/jobs/${id}/events`, { headers, signal });
      for await (const [number, event] of events(response.body)) {
        last = number;
        tries = 0;
        onEvent(event);
        if (["done", "failed", "cancelled"].includes(event.kind)) return;
      }
    } catch (error) {
      if (signal?.aborted) return;
      if (tries === RETRIES) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, 300 * (tries + 1)));
  }
  throw new Error("The connection to the server was lost.");
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const lines = text.slice(0, end).split("\n");
      text = text.slice(end + 2);
      const number = lines.find((line) => line.startsWith("id: "));
      const data = lines.find((line) => line.startsWith("data: "));
      if (data) yield [Number(number.slice(4)), JSON.parse(data.slice(6))];
    }
  }
}
