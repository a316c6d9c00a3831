// A click on a column's title, or Enter and Space on it, sorts its table; a second one turns the order round.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const numeric = header.classList.contains("number");
      const first = header.dataset.first ?? "ascending";
      const second = first === "ascending" ? "descending" : "ascending";
      const order = header.getAttribute("aria-sort") === first ? second : first;
      for (const other of headers) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const valueOf = (row) => row.cells[column].dataset.value;
      const compare = (one, other) => {
        const [a, b] = [valueOf(one), valueOf(other)];
        // What has no value stays at the end in either order.
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        return sign * (numeric ? a - b : a.localeCompare(b));
      };
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort(compare));
    });
  });
}
