"""The report: one HTML file on which people see what fusing did."""
