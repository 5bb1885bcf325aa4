// A click on a heading sorts by its column: upwards, downwards, then as it was. Cells are compared by the number that
// they begin with, where at least half of a column's do, others as words. What has no number comes last either way.
"use strict";
(function () {
  const number = function (text) {
    const plain = text.replace(/,(?=\d{3})/g, "");
    const found = plain.match(/^[^\d\p{L}]*?([-+\u2212]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)/iu);
    return found ? Number(found[1].replace("\u2212", "-")) : NaN;
  };
  document.querySelectorAll("table.sortable").forEach(function (table) {
    const body = table.tBodies[0], rows = Array.from(body.rows), heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach(function (head, column) {
      const text = function (row) { return row.cells[column].textContent.trim(); };
      const numbers = rows.filter(function (row) { return !Number.isNaN(number(text(row))); });
      const numeric = numbers.length * 2 >= rows.length;
      const before = function (one, other) {
        if (!numeric) return text(one).localeCompare(text(other), undefined, { numeric: true });
        return number(text(one)) - number(text(other));
      };
      head.querySelector("button").addEventListener("click", function () {
        const order = { none: "ascending", ascending: "descending", descending: "none" }[head.ariaSort || "none"];
        heads.forEach(function (other) { other.removeAttribute("aria-sort"); });
        let sorted = rows.slice();
        if (order !== "none") {
          head.setAttribute("aria-sort", order);
          const sign = order === "ascending" ? 1 : -1;
          const absent = sorted.filter(function (row) { return numeric && Number.isNaN(number(text(row))); });
          sorted = sorted.filter(function (row) { return !absent.includes(row); });
          sorted.sort(function (one, other) { return sign * before(one, other); });
          sorted = sorted.concat(absent);
        }
        body.append(...sorted);
      });
    });
  });
})();
