"""Instructions of a small call and of a row's start, counted by callgrind, against recorded figures."""
