// Sort a table by the column whose heading is pressed, by mouse or keyboard; a second press reverses the order.
"use strict";
function order(cell) {
  const value = cell.dataset.order;
  const number = Number(value);
  return value === "" ? null : Number.isNaN(number) ? value : number;
}
function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}
function sortBy(head) {
  const table = head.closest("table");
  const column = head.cellIndex;
  const turn = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const rows = Array.from(table.tBodies[0].rows, (row) => [order(row.cells[column]), row]);
  rows.sort(([a], [b]) => (a === null) - (b === null) || (a === null ? 0 : turn * compare(a, b)));
  table.tHead.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", turn === 1 ? "ascending" : "descending");
  rows.forEach(([, row]) => table.tBodies[0].append(row));
}
document.querySelectorAll("table.sortable thead th").forEach((head) => {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  if (head.title) button.title = head.title;
  head.append(button);
  button.addEventListener("click", () => sortBy(head));
});
// Print collapsed sections as well.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
