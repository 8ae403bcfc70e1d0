"""The file that the webui runs. It only finds the host and registers; everything that thinks is in lib_locon."""

from lib_locon.hosts import register

register()
