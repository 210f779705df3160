"""Files that survive a crash: replaced atomically, appended line by line, read within bounds."""
