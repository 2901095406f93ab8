"""Whether three generators explain what the channels do."""
