"""Looking into sources: figures and plots (`stats`, `plots`), and pages of what training sees (`view`, `page`)."""
