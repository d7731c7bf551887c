"""What figures have in common. No torch."""

#: What installs seaborn.
EXTRA = "install the figure's library with pip install 'dsfreeze[plot]'"
