"""SD3, SD3.5-medium and SD3.5-large: their configuration, their block, their transformer."""
