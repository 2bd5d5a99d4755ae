// Requests to the server. An answer that is not 200 becomes an Error with the server's own sentence.

const JSON_HEADERS = { "Content-Type": "application/json" };

async function checked(response) {
  if (response.ok) return response;
  let text = `The server answered with ${response.status}.`;
  try {
    text = (await response.json()).error;
  } catch {
    // not from our server: a proxy in between
  }
  throw new Error(text);
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Is it still running?");
  }
}

export async function get(path) {
  return (await checked(await reach(path))).json();
}

export async function post(path, body, signal) {
  const options = { method: "POST", headers: JSON_HEADERS, body: JSON.stringify(body), signal };
  return (await checked(await reach(path, options))).json();
}

/** The result of a request; `progress` is called with each event on the way. `signal` stops it. */
export async function postWithProgress(path, body, signal, progress) {
  const headers = { ...JSON_HEADERS, Accept: "text/event-stream" };
  const response = await checked(await reach(path, { method: "POST", headers, body: JSON.stringify(body), signal }));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The server closed the connection before it was done.");
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const [, kind, data] = event.match(/^event: (\w+)\ndata: (.*)$/s);
      const found = JSON.parse(data);
      if (kind === "result") return found;
      if (kind === "error") throw new Error(found.error);
      progress(found);
      await globalThis.scheduler?.yield?.(); // let the browser draw, where events came in one piece
    }
  }
}
