// Keys, the next item fetched ahead, and the live page. Every page works without this.
"use strict";
(() => {
  const main = document.querySelector("main");
  let ahead = null; // the next item: {id, text}
  let busy = false;

  const typing = (target) => /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName);
  const form = () => document.querySelector("form.decide");
  const item = () => document.querySelector("[data-item]");

  async function fetchAhead() {
    const after = item()?.dataset.after;
    if (!after) return;
    const response = await fetch(`/audit?part=1&id=${encodeURIComponent(after)}`);
    if (response.ok && after === item()?.dataset.after) ahead = { id: after, text: await response.text() };
  }

  function show(text) {
    main.innerHTML = text;
    const heading = main.querySelector("h1");
    if (heading) heading.focus();
    ahead = null;
    requestAnimationFrame(() => setTimeout(fetchAhead)); // once this is painted
  }

  async function decide(action) {
    const fields = new URLSearchParams(new FormData(form()));
    fields.set("action", action);
    busy = true;
    try {
      const response = await fetch("/decide", {
        method: "POST", body: fields, headers: { Accept: "application/json" },
      });
      if (!response.ok) { say(await response.text()); return; }
      const made = await response.json();
      if (ahead && !made.show) show(ahead.text);
      else show(await (await fetch(`/audit?part=1${made.show ? `&id=${encodeURIComponent(made.show)}` : ""}`)).text());
      say(`${made.id}: ${made.action} · ${made.left}`);
    } catch (error) {
      say(String(error));
    } finally {
      busy = false;
    }
  }

  function say(text) {
    const status = document.querySelector("[role=status]");
    if (status) status.textContent = text;
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.body.dataset.keys === "off") return;
    if (typing(event.target)) { if (event.key === "Escape") event.target.blur(); return; }
    const key = event.key.toLowerCase();
    const links = document.querySelectorAll("[data-row] a");
    if (links.length && (key === "j" || key === "k")) {
      const rows = [...links];
      const at = rows.indexOf(document.activeElement);
      rows[Math.min(rows.length - 1, Math.max(0, at + (key === "j" ? 1 : -1)))].focus();
    } else if (form()) {
      const button = document.querySelector(`form.decide button[data-key="${CSS.escape(key)}"]`);
      if (key === "n") { event.preventDefault(); document.querySelector("[name=note]")?.focus(); }
      else if (button) {
        event.preventDefault();
        if (item() && !busy && !button.dataset.reveal) decide(button.value);
        else if (!busy) button.click();
      }
    }
  });

  document.addEventListener("submit", (event) => {
    const button = event.submitter;
    if (item() && event.target === form() && button && !button.dataset.reveal) {
      event.preventDefault();
      if (!busy) decide(button.value);
    }
  });

  if (item()) fetchAhead();
  const live = document.querySelector("[data-live]");
  if (live) {
    setInterval(async () => {
      if (document.hidden) return;
      try {
        const response = await fetch("/live");
        if (response.ok) live.innerHTML = await response.text();
      } catch { /* the server has ended; what was seen last stays */ }
    }, 2000);
  }
})();
