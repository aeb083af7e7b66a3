"""The report and the page of the data: one HTML file each."""
