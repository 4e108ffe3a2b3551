for (const item of document.querySelectorAll("#variants li")) {
  const label = document.createElement("label"), box = document.createElement("input");
  box.type = "checkbox";
  box.checked = true;
  label.append(box, ...item.childNodes);
  item.append(label);
  box.addEventListener("change", () => {
    for (const part of document.querySelectorAll("[data-series]")) {
      if (part.dataset.series === item.dataset.name) part.toggleAttribute("hidden", !box.checked);
    }
  });
}
const number = (cell) => {
  const found = cell.textContent.replaceAll("\u2212", "-").match(/^[\s<+]*(-?\d[\d.]*)/);
  return found ? Number(found[1]) : NaN;
};
const text = (cell) => cell.textContent.trim();
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const words = column === 0 || head.classList.contains("text");
      const first = words ? "ascending" : "descending";
      const second = words ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? second : first;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const compared = (a, b) => {
        const [x, y] = [a.cells[column], b.cells[column]];
        if (words) return sign * text(x).localeCompare(text(y));
        const [p, q] = [number(x), number(y)];
        if (isNaN(p) || isNaN(q)) return isNaN(p) - isNaN(q); // absent values last
        return sign * (p - q);
      };
      body.append(...[...body.rows].sort(compared));
    });
  });
}
