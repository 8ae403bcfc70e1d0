// Speaks to the server. What it refuses, and that it is gone, become an Error with a sentence.

async function answer(request) {
  let response;
  try {
    response = await request;
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  const data = await response.json();
  if (!response.ok) throw new Error(data.error);
  return data;
}

export function get(path) {
  return answer(fetch(path));
}

export function post(path, body = {}) {
  return answer(fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  }));
}
