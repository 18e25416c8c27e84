# SPDX-License-Identifier: Apache-2.0
"""How English names currencies. The answer is the bare name ("Peso"); "Mexican peso" is built from the country's
adjectives, and what is listed here comes on top.
"""

# ISO 4217 code: the name to use instead of GeoNames', then the other forms.
CURRENCY_NAMES: dict[str, tuple[str, ...]] = {
    "BAM": ("Convertible mark", "Mark", "Marka"),
    "BOB": ("Boliviano", "Bolivianos"),
    "BRL": ("Real", "Reais"),
    "BYN": ("Ruble", "Rouble", "Rubel"),
    "CNY": ("Yuan", "Renminbi", "Yuan Renminbi", "Renminbi (Yuan)", "RMB"),
    "CRC": ("Colón",),
    "CZK": ("Koruna", "Crown"),
    "DKK": ("Krone", "Crown"),
    "GBP": ("Pound", "Pound sterling", "Sterling"),
    "ILS": ("Shekel", "New shekel", "New Israeli shekel", "Israeli new shekel", "Sheqel"),
    "ISK": ("Króna", "Crown"),
    "KHR": ("Riel",),
    "LSL": ("Loti", "Maloti"),
    "MNT": ("Tugrik", "Tögrög", "Tugrug"),
    "NIO": ("Córdoba", "Córdoba oro"),
    "NOK": ("Krone", "Crown"),
    "PEN": ("Sol", "Nuevo sol"),
    "PYG": ("Guaraní",),
    "QAR": ("Riyal", "Rial"),
    "RUB": ("Ruble", "Rouble"),
    "SAR": ("Riyal", "Rial"),
    "SEK": ("Krona", "Crown"),
    "SZL": ("Lilangeni", "Emalangeni"),
    "TOP": ("Paʻanga", "Pa'anga"),
    "TWD": ("Dollar", "New dollar", "New Taiwan dollar"),
    "UZS": ("Som", "Sum", "So'm"),
    "VES": ("Bolívar", "Bolívar soberano", "Bolivar digital"),
    "XAF": ("CFA franc", "Central African CFA franc", "Franc", "Franc CFA"),
    "XCD": ("East Caribbean dollar", "Eastern Caribbean dollar", "Dollar"),
    "XOF": ("CFA franc", "West African CFA franc", "Franc", "Franc CFA"),
    "YER": ("Rial", "Riyal"),
}

# A foreign currency keeps the adjective of the country that issues it (Ecuador: "US dollar").
CURRENCY_ISSUERS = {"AUD": "AU", "CHF": "CH", "ILS": "IL", "USD": "US"}

# The country changed its currency since 2024 (BG: the euro in 2026; ZW: Zimbabwe Gold in 2024), or has several in use.
NO_SINGLE_CURRENCY = {"BG", "BT", "PA", "PS", "ZW"}
