"""Results as self-contained HTML pages: queries with ranked pictures, tables, curves."""
