"use strict";

// Asks every two seconds whether the run has gone on, says so in a corner, and loads the page again when its report has
// changed: at the same place, with the same parts open, and not while text is selected.

(() => {
  const EVERY = 2000;
  const LATER = 10000; // between two questions that the server does not answer
  const KEPT = `manyshot ${location.host}`;
  const own = document.currentScript.dataset.version;

  const corner = document.createElement("output");
  corner.ariaLive = "off"; // it changes all the time
  Object.assign(corner.style, {
    position: "fixed", right: "12px", bottom: "12px", zIndex: 10, maxWidth: "min(480px, calc(100vw - 24px))",
    padding: "6px 12px", borderRadius: "8px", font: "13px/1.4 system-ui, sans-serif", whiteSpace: "pre-wrap",
    background: "#1f2328", color: "#ffffff", overflowWrap: "anywhere",
  });
  document.body.append(corner);

  const parts = () => [...document.querySelectorAll("details")];
  const choices = () => [...document.querySelectorAll("select")];

  // the last section that begins above the top of the window, and how far above: what stands before it may grow
  function place() {
    const sections = [...document.querySelectorAll("section[id]")];
    const above = sections.filter((node) => node.getBoundingClientRect().top <= 0).pop();
    return above ? { id: above.id, gone: -above.getBoundingClientRect().top } : { id: null, gone: scrollY };
  }

  function keep() {
    const open = parts().map((node) => node.open);
    const chosen = choices().map((node) => node.selectedIndex);
    sessionStorage.setItem(KEPT, JSON.stringify({ ...place(), open, chosen }));
  }

  function restore() {
    const kept = JSON.parse(sessionStorage.getItem(KEPT) || "null");
    sessionStorage.removeItem(KEPT);
    if (!kept) return;
    parts().forEach((node, i) => { if (i in kept.open) node.open = kept.open[i]; });
    choices().forEach((node, i) => {
      if (!(i in kept.chosen) || kept.chosen[i] >= node.options.length || node.selectedIndex === kept.chosen[i]) return;
      node.selectedIndex = kept.chosen[i];
      node.dispatchEvent(new Event("change"));
    });
    const node = kept.id ? document.getElementById(kept.id) : null;
    const top = node ? node.getBoundingClientRect().top + scrollY : 0;
    scrollTo({ top: top + kept.gone, behavior: "instant" });
  }

  function reload() {
    keep();
    history.scrollRestoration = "manual";
    location.reload();
  }

  async function ask() {
    try {
      const answer = await fetch("/version", { cache: "no-store", credentials: "omit" });
      if (!answer.ok) throw new Error(String(answer.status));
      const found = await answer.json();
      if (corner.textContent !== found.status) corner.textContent = found.status;
      if (found.version !== own && getSelection().isCollapsed) return reload();
      setTimeout(ask, document.hidden ? LATER : EVERY);
    } catch {
      const text = "manyshot serve does not answer: this page shows the run as it was then";
      if (corner.textContent !== text) corner.textContent = text;
      setTimeout(ask, LATER);
    }
  }

  // when everything is drawn and has its height
  addEventListener("load", () => requestAnimationFrame(() => { restore(); ask(); }));
})();
