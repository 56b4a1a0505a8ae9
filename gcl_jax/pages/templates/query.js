"use strict";
const get = (id) => document.getElementById(id);
const [form, said, results, preview] = ["query", "said", "results", "preview"].map(get);
let picture = null;
let asked = 0; // an answer that a later question has overtaken is dropped

const say = (text) => {
  said.textContent = text;
  said.hidden = !text;
};

const take = (file) => {
  say("");
  if (file && file.size > Number(form.dataset.mostBytes)) {
    say(`the picture is larger than ${form.dataset.mostMegabytes} MB: make it smaller.`);
    file = null;
  }
  if (preview.src) URL.revokeObjectURL(preview.src);
  picture = file || null;
  preview.hidden = get("clear").hidden = !picture;
  if (picture) preview.src = URL.createObjectURL(picture);
  else preview.removeAttribute("src");
};

preview.addEventListener("error", () => { preview.hidden = true; });
get("image").addEventListener("change", (event) => {
  take(event.target.files[0]);
  event.target.value = "";
});
get("clear").addEventListener("click", () => take(null));

addEventListener("dragover", (event) => {
  event.preventDefault();
  get("drop").classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) get("drop").classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  get("drop").classList.remove("over");
  if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) take(event.clipboardData.files[0]);
});

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const mine = ++asked;
  const query = new URLSearchParams();
  for (const name of ["text", "k", "modality"]) query.set(name, get(name).value);
  say("");
  results.classList.add("waiting");
  results.setAttribute("aria-busy", "true");
  let text;
  let ok = false;
  try {
    const answer = await fetch(`search?${query}`, {
      method: "POST",
      body: picture,
      headers: { "content-type": "application/octet-stream" },
    });
    text = await answer.text();
    ok = answer.ok;
  } catch {
    text = "the server does not answer: is it still running?";
  }
  if (mine !== asked) return;
  results.classList.remove("waiting");
  results.removeAttribute("aria-busy");
  if (ok) results.innerHTML = text; // made by the server's templates, which escape
  else {
    results.replaceChildren();
    say(text);
  }
});
