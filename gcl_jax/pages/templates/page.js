"use strict";
// Tips: of whatever the pointer is over, or a finger has touched.
const tip = document.getElementById("tip");
const show = (event) => {
  const at = event.target.closest && event.target.closest("[data-tip]");
  tip.hidden = !at;
  if (!at) return;
  tip.textContent = at.dataset.tip;
  const width = Math.min(tip.offsetWidth, innerWidth - 16);
  const left = Math.max(8, Math.min(event.clientX - width / 2, innerWidth - width - 8));
  const above = event.clientY - tip.offsetHeight - 14;
  tip.style.left = `${left}px`;
  tip.style.top = `${above < 8 ? event.clientY + 18 : above}px`;
};
addEventListener("pointermove", show);
addEventListener("pointerdown", show);
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

// Heat maps: which recall they show.
for (const group of document.querySelectorAll(".switch")) {
  group.hidden = false;
  group.addEventListener("click", (event) => {
    const k = event.target.dataset.k;
    if (!k) return;
    for (const button of group.children) {
      button.setAttribute("aria-pressed", String(button === event.target));
    }
    for (const cell of document.querySelectorAll(`[data-k${k}]`)) {
      const [text, level] = cell.getAttribute(`data-k${k}`).split("|");
      cell.textContent = text;
      cell.className = level;
    }
    for (const name of document.querySelectorAll("[data-k-name]")) {
      name.textContent = `R@${k}`;
    }
  });
}
