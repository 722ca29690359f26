"""Token counting, prices, efficiency metrics and audit."""
