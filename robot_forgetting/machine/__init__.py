"""This computer: files, processes, the terminal, devices, drivers, assets."""
