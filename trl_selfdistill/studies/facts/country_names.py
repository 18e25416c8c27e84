# SPDX-License-Identifier: Apache-2.0
"""How English names sovereign states, their capitals and their currencies: the accepted forms that the GeoNames data
lacks. A dependent territory is not in the table: "which country" has no undisputed answer for its cities.
"""

from typing import NamedTuple


class CountryName(NamedTuple):
    """The form that a language model most likely says, the other common forms, and the adjectives."""

    name: str
    aliases: tuple[str, ...]
    adjectives: tuple[str, ...]


# ISO 3166 code | name | other names | adjectives
_COUNTRIES = """
AD|Andorra|Principality of Andorra|Andorran
AE|United Arab Emirates|UAE;U.A.E.;Emirates|Emirati;UAE;United Arab Emirates
AF|Afghanistan|Islamic Emirate of Afghanistan|Afghan
AG|Antigua and Barbuda|Antigua & Barbuda|Antiguan
AL|Albania|Republic of Albania|Albanian
AM|Armenia|Republic of Armenia|Armenian
AO|Angola|Republic of Angola|Angolan
AR|Argentina|Argentine Republic|Argentine;Argentinian;Argentina
AT|Austria|Republic of Austria|Austrian
AU|Australia|Commonwealth of Australia|Australian
AZ|Azerbaijan|Republic of Azerbaijan|Azerbaijani;Azeri
BA|Bosnia and Herzegovina|Bosnia;Bosnia & Herzegovina;Bosnia-Herzegovina|Bosnian;Bosnia and Herzegovina
BB|Barbados||Barbadian;Barbados;Bajan
BD|Bangladesh|People's Republic of Bangladesh|Bangladeshi
BE|Belgium|Kingdom of Belgium|Belgian
BF|Burkina Faso|Burkina|Burkinabe
BG|Bulgaria|Republic of Bulgaria|Bulgarian
BH|Bahrain|Kingdom of Bahrain|Bahraini
BI|Burundi|Republic of Burundi|Burundian;Burundi
BJ|Benin|Republic of Benin|Beninese
BN|Brunei|Brunei Darussalam|Brunei;Bruneian
BO|Bolivia|Plurinational State of Bolivia|Bolivian
BR|Brazil|Brasil;Federative Republic of Brazil|Brazilian
BS|Bahamas|The Bahamas;Commonwealth of The Bahamas|Bahamian
BT|Bhutan|Kingdom of Bhutan|Bhutanese
BW|Botswana|Republic of Botswana|Botswana;Botswanan
BY|Belarus|Republic of Belarus;Byelorussia|Belarusian;Belarussian
BZ|Belize||Belize;Belizean
CA|Canada||Canadian
CD|Democratic Republic of the Congo|DR Congo;DRC;D.R. Congo;Democratic Republic of Congo;Congo-Kinshasa;Zaire|Congolese
CF|Central African Republic|CAR|Central African
CG|Republic of the Congo|Republic of Congo;Congo-Brazzaville;Congo Republic|Congolese
CH|Switzerland|Swiss Confederation|Swiss
CI|Ivory Coast|Côte d'Ivoire;Republic of Côte d'Ivoire|Ivorian
CL|Chile|Republic of Chile|Chilean
CM|Cameroon|Republic of Cameroon|Cameroonian
CN|China|People's Republic of China;PRC;P.R. China;Mainland China|Chinese
CO|Colombia|Republic of Colombia|Colombian
CR|Costa Rica|Republic of Costa Rica|Costa Rican
CU|Cuba|Republic of Cuba|Cuban
CV|Cape Verde|Cabo Verde;Republic of Cabo Verde|Cape Verdean
CY|Cyprus|Republic of Cyprus|Cypriot
CZ|Czech Republic|Czechia|Czech
DE|Germany|Federal Republic of Germany|German
DJ|Djibouti|Republic of Djibouti|Djiboutian;Djibouti
DK|Denmark|Kingdom of Denmark|Danish
DM|Dominica|Commonwealth of Dominica|Dominican
DO|Dominican Republic||Dominican
DZ|Algeria|People's Democratic Republic of Algeria|Algerian
EC|Ecuador|Republic of Ecuador|Ecuadorian
EE|Estonia|Republic of Estonia|Estonian
EG|Egypt|Arab Republic of Egypt|Egyptian
ER|Eritrea|State of Eritrea|Eritrean
ES|Spain|Kingdom of Spain|Spanish
ET|Ethiopia|Federal Democratic Republic of Ethiopia|Ethiopian
FI|Finland|Republic of Finland|Finnish
FJ|Fiji|Republic of Fiji|Fijian;Fiji
FM|Micronesia|Federated States of Micronesia;FSM|Micronesian
FR|France|French Republic|French
GA|Gabon|Gabonese Republic|Gabonese
GB|United Kingdom|UK;U.K.;Great Britain;Britain;United Kingdom of Great Britain and Northern Ireland|British;UK
GD|Grenada||Grenadian
GE|Georgia|Republic of Georgia|Georgian
GH|Ghana|Republic of Ghana|Ghanaian;Ghana
GM|Gambia|The Gambia;Republic of The Gambia|Gambian
GN|Guinea|Republic of Guinea;Guinea-Conakry|Guinean
GQ|Equatorial Guinea|Republic of Equatorial Guinea|Equatoguinean
GR|Greece|Hellenic Republic|Greek
GT|Guatemala|Republic of Guatemala|Guatemalan
GW|Guinea-Bissau|Guinea Bissau;Republic of Guinea-Bissau|Bissau-Guinean
GY|Guyana|Co-operative Republic of Guyana|Guyanese;Guyana
HN|Honduras|Republic of Honduras|Honduran
HR|Croatia|Republic of Croatia|Croatian
HT|Haiti|Republic of Haiti|Haitian
HU|Hungary||Hungarian
ID|Indonesia|Republic of Indonesia|Indonesian
IE|Ireland|Republic of Ireland;Éire|Irish
IL|Israel|State of Israel|Israeli
IN|India|Republic of India|Indian
IQ|Iraq|Republic of Iraq|Iraqi
IR|Iran|Islamic Republic of Iran;Persia|Iranian
IS|Iceland|Republic of Iceland|Icelandic
IT|Italy|Italian Republic|Italian
JM|Jamaica||Jamaican
JO|Jordan|Hashemite Kingdom of Jordan|Jordanian
JP|Japan||Japanese
KE|Kenya|Republic of Kenya|Kenyan
KG|Kyrgyzstan|Kyrgyz Republic;Kirghizia;Kirgizstan|Kyrgyz;Kyrgyzstani
KH|Cambodia|Kingdom of Cambodia;Kampuchea|Cambodian
KI|Kiribati|Republic of Kiribati|Kiribati
KM|Comoros|The Comoros;Union of the Comoros|Comorian
KN|Saint Kitts and Nevis|St. Kitts and Nevis;Saint Kitts & Nevis;St Kitts & Nevis|Kittitian
KP|North Korea|Democratic People's Republic of Korea;DPRK|North Korean
KR|South Korea|Republic of Korea;Korea;ROK|South Korean;Korean
KW|Kuwait|State of Kuwait|Kuwaiti
KZ|Kazakhstan|Republic of Kazakhstan;Kazakstan|Kazakhstani;Kazakh
LA|Laos|Lao People's Democratic Republic;Lao PDR;Lao|Lao;Laotian
LB|Lebanon|Lebanese Republic|Lebanese
LC|Saint Lucia|St. Lucia|Saint Lucian
LI|Liechtenstein|Principality of Liechtenstein|Liechtenstein
LK|Sri Lanka|Democratic Socialist Republic of Sri Lanka;Ceylon|Sri Lankan
LR|Liberia|Republic of Liberia|Liberian
LS|Lesotho|Kingdom of Lesotho|Lesotho;Basotho
LT|Lithuania|Republic of Lithuania|Lithuanian
LU|Luxembourg|Grand Duchy of Luxembourg;Luxemburg|Luxembourgish
LV|Latvia|Republic of Latvia|Latvian
LY|Libya|State of Libya|Libyan
MA|Morocco|Kingdom of Morocco|Moroccan
MC|Monaco|Principality of Monaco|Monegasque
MD|Moldova|Republic of Moldova;Moldavia|Moldovan
ME|Montenegro||Montenegrin
MG|Madagascar|Republic of Madagascar|Malagasy
MH|Marshall Islands|Republic of the Marshall Islands|Marshallese
MK|North Macedonia|Macedonia;Republic of North Macedonia;Republic of Macedonia;FYROM|Macedonian
ML|Mali|Republic of Mali|Malian
MM|Myanmar|Burma;Myanmar (Burma);Republic of the Union of Myanmar|Burmese;Myanmar
MN|Mongolia||Mongolian
MR|Mauritania|Islamic Republic of Mauritania|Mauritanian
MT|Malta|Republic of Malta|Maltese
MU|Mauritius|Republic of Mauritius|Mauritian
MV|Maldives|The Maldives;Republic of Maldives;Maldive Islands|Maldivian
MW|Malawi|Republic of Malawi|Malawian
MX|Mexico|Méjico;México;United Mexican States|Mexican
MY|Malaysia||Malaysian
MZ|Mozambique|Republic of Mozambique|Mozambican
NA|Namibia|Republic of Namibia|Namibian;Namibia
NE|Niger|Republic of the Niger;Republic of Niger|Nigerien
NG|Nigeria|Federal Republic of Nigeria|Nigerian
NI|Nicaragua|Republic of Nicaragua|Nicaraguan
NL|Netherlands|The Netherlands;Holland;Kingdom of the Netherlands|Dutch
NO|Norway|Kingdom of Norway|Norwegian
NP|Nepal|Federal Democratic Republic of Nepal|Nepalese;Nepali
NR|Nauru|Republic of Nauru|Nauruan
NZ|New Zealand|Aotearoa;Aotearoa New Zealand|New Zealand
OM|Oman|Sultanate of Oman|Omani
PA|Panama|Republic of Panama|Panamanian
PE|Peru|Republic of Peru|Peruvian
PG|Papua New Guinea|PNG|Papua New Guinean
PH|Philippines|The Philippines;Republic of the Philippines|Philippine;Filipino;Philippines
PK|Pakistan|Islamic Republic of Pakistan|Pakistani
PL|Poland|Republic of Poland|Polish
PS|Palestine|State of Palestine;Palestinian Territory;Palestinian Territories|Palestinian
PT|Portugal|Portuguese Republic|Portuguese
PW|Palau|Republic of Palau|Palauan
PY|Paraguay|Republic of Paraguay|Paraguayan
QA|Qatar|State of Qatar|Qatari
RO|Romania|Rumania|Romanian
RS|Serbia|Republic of Serbia|Serbian
RU|Russia|Russian Federation|Russian
RW|Rwanda|Republic of Rwanda|Rwandan
SA|Saudi Arabia|Kingdom of Saudi Arabia;KSA|Saudi;Saudi Arabian
SB|Solomon Islands||Solomon Islands
SC|Seychelles|Republic of Seychelles|Seychellois;Seychelles
SD|Sudan|Republic of the Sudan|Sudanese
SE|Sweden|Kingdom of Sweden|Swedish
SG|Singapore|Republic of Singapore|Singapore;Singaporean
SI|Slovenia|Republic of Slovenia|Slovenian
SK|Slovakia|Slovak Republic|Slovak
SL|Sierra Leone|Republic of Sierra Leone|Sierra Leonean
SM|San Marino|Republic of San Marino|Sammarinese
SN|Senegal|Republic of Senegal|Senegalese
SO|Somalia|Federal Republic of Somalia|Somali
SR|Suriname|Surinam;Republic of Suriname|Surinamese
SS|South Sudan|Republic of South Sudan|South Sudanese
ST|São Tomé and Príncipe|São Tomé & Príncipe;Saint Thomas and Prince|São Tomé and Príncipe;Santomean
SV|El Salvador|Republic of El Salvador|Salvadoran
SY|Syria|Syrian Arab Republic|Syrian
SZ|Eswatini|Swaziland;Kingdom of Eswatini|Swazi
TD|Chad|Republic of Chad|Chadian
TG|Togo|Togolese Republic|Togolese
TH|Thailand|Kingdom of Thailand;Siam|Thai
TJ|Tajikistan|Republic of Tajikistan|Tajikistani;Tajik
TL|East Timor|Timor-Leste;Timor Leste;Democratic Republic of Timor-Leste|East Timorese
TM|Turkmenistan||Turkmenistan;Turkmen;Turkmenistani
TN|Tunisia|Republic of Tunisia|Tunisian
TO|Tonga|Kingdom of Tonga|Tongan
TR|Turkey|Türkiye;Republic of Turkey;Republic of Türkiye|Turkish
TT|Trinidad and Tobago|Trinidad & Tobago|Trinidad and Tobago;Trinidadian
TV|Tuvalu||Tuvaluan
TW|Taiwan|Republic of China;Taiwan (Republic of China);ROC;Taiwan, Province of China|Taiwanese
TZ|Tanzania|United Republic of Tanzania|Tanzanian
UA|Ukraine||Ukrainian
UG|Uganda|Republic of Uganda|Ugandan
US|United States|United States of America;USA;U.S.A.;US;U.S.;America|US;U.S.;United States;American
UY|Uruguay|Oriental Republic of Uruguay|Uruguayan
UZ|Uzbekistan|Republic of Uzbekistan|Uzbekistani;Uzbek
VA|Vatican City|Vatican;Holy See;Vatican City State|Vatican
VC|Saint Vincent and the Grenadines|St. Vincent and the Grenadines;Saint Vincent & the Grenadines|Vincentian
VE|Venezuela|Bolivarian Republic of Venezuela|Venezuelan
VN|Vietnam|Viet Nam;Socialist Republic of Vietnam|Vietnamese
VU|Vanuatu|Republic of Vanuatu|Vanuatu
WS|Samoa|Western Samoa;Independent State of Samoa|Samoan
XK|Kosovo|Republic of Kosovo|Kosovan;Kosovar
YE|Yemen|Republic of Yemen|Yemeni
ZA|South Africa|Republic of South Africa;RSA|South African
ZM|Zambia|Republic of Zambia|Zambian
ZW|Zimbabwe|Republic of Zimbabwe|Zimbabwean
"""


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split(";")) if text else ()


COUNTRY_NAMES: dict[str, CountryName] = {
    code: CountryName(name, _split(aliases), _split(adjectives))
    for code, name, aliases, adjectives in (line.split("|") for line in _COUNTRIES.split("\n") if line)
}

# Capitals: the name to use first where GeoNames' is out of date, misspelt or less common, then the other forms.
CAPITAL_NAMES: dict[str, tuple[str, ...]] = {
    "AG": ("St. John's", "Saint John's"),
    "BR": ("Brasília",),
    "CH": ("Bern", "Berne"),
    "CM": ("Yaoundé",),
    "CO": ("Bogotá",),
    "CR": ("San José",),
    "GD": ("St. George's", "Saint George's"),
    "IN": ("New Delhi", "Delhi"),
    "KI": ("South Tarawa", "Tarawa"),
    "KZ": ("Astana", "Nur-Sultan"),  # renamed back in September 2022
    "MD": ("Chișinău", "Kishinev"),
    "MG": ("Antananarivo", "Tananarive"),
    "MM": ("Naypyidaw", "Nay Pyi Taw", "Naypyitaw"),
    "MN": ("Ulaanbaatar", "Ulan Bator"),
    "MV": ("Malé",),
    "PW": ("Ngerulmud",),  # GeoNames names the state, Melekeok, in which it lies
    "PY": ("Asunción",),
    "TD": ("N'Djamena", "Ndjamena"),
    "TG": ("Lomé",),
    "TM": ("Ashgabat", "Ashkhabad"),
    "TO": ("Nukuʻalofa", "Nuku'alofa"),
    "UA": ("Kyiv", "Kiev"),
    "US": ("Washington, D.C.", "Washington"),
    "UZ": ("Tashkent", "Toshkent"),
    "YE": ("Sana'a", "Sanaa"),
}

# Disputed, shared between cities, moved in 2026 (GQ), or asked for under a name that a US state shares (GE).
NO_SINGLE_CAPITAL = {"BO", "GE", "GQ", "IL", "LK", "NR", "PS", "SZ", "ZA"}
