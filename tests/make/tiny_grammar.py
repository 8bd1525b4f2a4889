"""A grammar of legal English: contract clauses, agreements, statutes, notices of rulemaking.

Composer(random).document() returns a text and the information in its choices in nats: minus the log
of the probability of this derivation, which is at most the probability of the text. So the mean
over many documents is an upper bound on what a perfect model of the grammar must still pay.

The notation of the templates:
  [a|b|3:c]      one of them; c is three times as likely
  {name}         the rule of this name. One in capitals is expanded once in a document and the same
                 from then on, so that the parties, the state and the style stay what they are
  {x=name}       expands the rule and remembers the text as {x} until the section ends
  {^name}        with a capital first letter
  {p is are}     the first form if party p is one person, else the second
A name of the class's methods (do_name) takes precedence over a rule.
"""
import functools
import math
import re

# ---- Numbers, amounts, dates ------------------------------------------------------------------

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
MONTHS = {"January": 31, "February": 28, "March": 31, "April": 30, "May": 31, "June": 30,
          "July": 31, "August": 31, "September": 30, "October": 31, "November": 30, "December": 31}
ROMAN = "i ii iii iv v vi vii viii".split()


def in_words(n):
    """A number below a billion in words."""
    for size, name in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= size:
            rest = n % size
            return in_words(n // size) + " " + name + (" " + in_words(rest) if rest else "")
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + ("-" + ONES[n % 10] if n % 10 else "")


# ---- Parties ----------------------------------------------------------------------------------

# What the document calls itself, and who its parties are: the one who sells, works or lends, and
# the one who pays. A name in -s is more than one person.
ROLES = {
    "Agreement": ["3:Seller/Buyer", "3:Licensor/Licensee", "3:Consultant/Company",
                  "2:Lender/Borrower", "2:Supplier/Distributor", "2:Provider/Customer",
                  "2:Executive/Company", "2:Sellers/Purchaser", "Franchisor/Franchisee",
                  "Contractor/Client", "2:Company/Investors", "Lender/Borrowers", "Manager/Owner",
                  "Assignor/Assignees"],
    "Contract": ["3:Contractor/Owner", "2:Supplier/Customer", "Consultants/Client",
                 "Vendor/Purchasers", "Seller/Buyer"],
    "Lease": ["3:Landlord/Tenant", "Lessor/Lessee", "Landlord/Tenants"],
    "License": ["3:Licensor/Licensee", "Licensor/Licensees"],
}

# state: county, city
PLACES = {
    "Delaware": ("New Castle", "Wilmington"), "New York": ("New York", "New York City"),
    "California": ("Los Angeles", "Los Angeles"), "Texas": ("Harris", "Houston"),
    "Illinois": ("Cook", "Chicago"), "Ohio": ("Franklin", "Columbus"),
    "Nevada": ("Clark", "Las Vegas"), "Florida": ("Orange", "Orlando"),
    "Michigan": ("Wayne", "Detroit"), "Georgia": ("Fulton", "Atlanta"),
    "Washington": ("King", "Seattle"), "Virginia": ("Henrico", "Richmond"),
    "Colorado": ("Denver", "Denver"), "Minnesota": ("Ramsey", "Saint Paul"),
}

# agency: short name, CFR title, what it regulates, the law it does it under
AGENCIES = {
    "Food and Drug Administration": ("FDA", 21, ["5:medical devices", "2:prescription drugs",
        "2:food additives", "dietary supplements", "infant formulas"],
        "Federal Food, Drug, and Cosmetic Act"),
    "Environmental Protection Agency": ("EPA", 40, ["3:pesticides", "2:hazardous wastes",
        "emissions of air pollutants", "public water systems"], "Clean Air Act"),
    "Federal Aviation Administration": ("FAA", 14, ["2:civil aircraft", "2:commercial pilots",
        "repair stations", "unmanned aircraft"], "Federal Aviation Act"),
    "Securities and Exchange Commission": ("SEC", 17, ["2:investment advisers",
        "2:public offerings", "broker-dealers", "transfer agents"],
        "Securities Exchange Act of 1934"),
    "Federal Communications Commission": ("FCC", 47, ["2:radio stations", "wireless carriers",
        "cable operators"], "Communications Act of 1934"),
    "Nuclear Regulatory Commission": ("NRC", 10, ["nuclear reactors", "nuclear materials"],
        "Atomic Energy Act of 1954"),
    "Federal Motor Carrier Safety Administration": ("FMCSA", 49, ["2:motor carriers",
        "commercial drivers"], "Motor Carrier Safety Act of 1984"),
}

# Where it is another law, and what is goods that one can sell.
LAWS = {"pesticides": "Federal Insecticide, Fungicide, and Rodenticide Act",
        "public water systems": "Safe Drinking Water Act",
        "hazardous wastes": "Resource Conservation and Recovery Act"}
GOODS = ("medical devices", "prescription drugs", "food additives", "dietary supplements",
         "infant formulas", "pesticides")

# A statute's subject: title of the act, who is regulated, defined terms with their meanings.
SUBJECTS = {
    "Consumer Lending Act": ("lender", [
        ("Consumer loan",
         "a loan made to [a natural person|an individual] [primarily |]for personal, family, or "
         "household purposes"),
        ("Lender",
         "a person that [makes|offers or makes] [one or more|more than {few}] consumer loans in "
         "[this State|any calendar year]"),
        ("Finance charge",
         "[the cost of credit as a dollar amount|any amount payable as a condition of the loan]"),
        ("Borrower", "an individual who [receives|applies for] a consumer loan")]),
    "Water Quality Act": ("operator", [
        ("Discharge", "the [addition|release] of [any|a] pollutant to the waters of the State"),
        ("Operator",
         "the person [responsible for|in control of] the daily operation of a facility"),
        ("Facility",
         "any [building, structure, or installation|plant or other source] that [emits or may "
         "emit|discharges] a pollutant"),
        ("Waters of the State",
         "all [lakes, rivers, and streams|surface water and ground water] within the boundaries of "
         "the State")]),
    "Residential Tenancies Act": ("landlord", [
        ("Dwelling unit",
         "a structure, or part of a structure, that is used as a [home|residence] by one or "
         "more persons"),
        ("Landlord", "the owner[, lessor, or sublessor|] of a dwelling unit"),
        ("Security deposit",
         "[money|any payment] [held|received] by the landlord to secure the performance of the "
         "rental agreement"),
        ("Tenant", "a person entitled under a rental agreement to occupy a dwelling unit")]),
    "Data Protection Act": ("controller", [
        ("Controller",
         "a person that[, alone or jointly with others,|] determines the purposes of processing "
         "personal data"),
        ("Personal data",
         "information that [identifies|is linked to] an [individual|identified individual]"),
        ("Processing",
         "any operation performed on personal data[, whether or not by automated means|]"),
        ("Consumer", "an individual who is a resident of [this State|the State]")]),
    "Professional Licensing Act": ("licensee", [
        ("Board", "the State Board of [Nursing|Pharmacy|Accountancy|Engineering]"),
        ("License", "an authorization issued by the [board|department] to practice a profession"),
        ("Licensee", "a person who holds a [valid |]license"),
        ("Unprofessional conduct",
         "[gross negligence|fraud or deceit|a violation of a rule] in the practice of "
         "the profession")]),
    "Motor Carriers Act": ("carrier", [
        ("Carrier",
         "a person engaged in the transportation of [passengers|property|goods] for compensation"),
        ("Motor vehicle",
         "a vehicle propelled [by mechanical power|by a motor] and used on a public highway"),
        ("Driver", "an individual who operates a motor vehicle"),
        ("Gross weight", "the weight of a motor vehicle and its load")]),
}

# ---- Rules ------------------------------------------------------------------------------------

RULES = {
    # Style, once in a document
    "AGR": ["8:Agreement", "Contract", "Lease", "License"],
    "MODAL": ["4:shall", "will"],
    "STATE": ["4:Delaware", "4:New York", "3:California", "2:Texas", "2:Illinois", "Ohio", "Nevada",
        "Florida", "Michigan", "Georgia", "Washington", "Virginia", "Colorado", "Minnesota"],
    "AGENCY": [
        "3:Food and Drug Administration",
        "3:Environmental Protection Agency",
        "2:Federal Aviation Administration",
        "2:Securities and Exchange Commission",
        "Federal Communications Commission",
        "Nuclear Regulatory Commission",
        "Federal Motor Carrier Safety Administration",
    ],
    "agr": ["this {AGR}"],
    "mod": ["{MODAL}"],
    "few": ["2:two", "3:three", "five", "ten"],

    # Small phrases
    "law": ["applicable law", "law"],
    "wn": ["2:prior written", "2:written"],
    "prior": ["prior written", "written", "express written"],
    "material": ["a material breach", "a breach", "any material breach"],
    "claims": [
        "[3:any and all|all|any] [2:claims|losses|liabilities], [damages|losses|liabilities][, "
            "costs|] and expenses",
        "any [loss, liability or damage|claim or demand]",
        "all claims, demands and actions",
    ],
    "counsel": ["2:reasonable attorneys' fees", "the fees of counsel", "court costs"],
    "except": [
        "except as [otherwise |][required by {law}|set forth in {ref}|provided in {ref}|expressly "
            "permitted by {agr}]",
    ],
    "subject": [
        "Subject to {ref}, ",
        "Except as provided in {ref}, ",
        "Notwithstanding any other provision of {agr}, ",
        "Unless the parties [otherwise agree|agree otherwise] in writing, ",
    ],
    "op_p": [
        "6:{^p}",
        "2:{subject}{p}",
        "During the term of {agr}, {p}",
        "To the [fullest|maximum] extent permitted by {law}, {p}",
    ],
    "breach": [
        "fails to perform [any of its obligations|any obligation] under {agr}",
        "commits {material} of {agr}",
        "is in [default|breach] of {agr}",
    ],
    "third": ["any third party", "any other person", "any person or entity"],
    "officers": [
        "{q its their} [officers, directors|officers|directors], [employees|agents] and "
            "[representatives|affiliates]",
        "{q its their} affiliates and their [employees|agents|successors]",
    ],
    "survive": [
        "[2:This Section|This provision|The provisions of this Section] {mod} survive [2:the "
            "[termination|expiration] of {agr}|termination].",
        "The obligations [set forth |]in this Section {mod} survive for {years} after [3:the "
            "termination|the expiration] of {agr}.",
    ],
    "writing": [
        "in writing",
        "in writing and signed by both parties",
        "by a written instrument signed by [the parties|both parties]",
    ],

    # Governing law
    "Governing Law": ["4:{gl1}[| {gl2}| {gl2} {gl3}| {gl3}]", "{gl2} {gl1}"],
    "gl1": [
        "4:{^agr} {mod} be governed by[, and construed in accordance with,| and construed in "
            "accordance with| and interpreted under|] the laws of the State of {STATE}[3:, without "
            "regard to its [conflict|conflicts] of [laws|law] [principles|rules|provisions]|3:|, "
            "excluding its conflict of laws rules].",
        "2:The laws of the State of {STATE} {mod} govern [2:{agr}|the validity and "
            "[interpretation|performance] of {agr}][| and any dispute arising [under|out of] it].",
        "{^agr} and the rights and obligations of the parties {mod} be governed by the laws of the "
            "State of {STATE}.",
    ],
    "gl2": [
        "2:[Each party [irrevocably |hereby |]submits|{^p} [irrevocably |hereby |]{p submits "
            "submit}] to the [3:exclusive |non-exclusive |]jurisdiction of the [state and federal "
            "|state |federal |]courts located in {COUNTY} County, {STATE}.",
        "Any [2:dispute|action|dispute or claim|legal proceeding] arising [under|out of|out of or "
            "relating to] {agr} {mod} be [brought|resolved|commenced] [only |exclusively |]in the "
            "[state and federal |state |]courts [of|located in] {CITY}, {STATE}.",
    ],
    "gl3": [
        "Each party [hereby |]waives [2:any right to a trial by jury|any objection to venue|its "
            "right to a jury trial][ in any such action|].",
        "The prevailing party {mod} be entitled to recover {counsel}[ from the other party|].",
        "The parties agree that {CITY}, {STATE} is a [proper|convenient] [venue|forum].",
    ],

    # Confidentiality
    "Confidentiality": [
        "2:{cf_def} {cf_duty}[ {cf_exc}|]{cf_end}",
        "2:{cf_duty} {cf_def}[| {cf_exc}]{cf_end}",
        "{cf_duty2}{cf_end}",
        "{cf_def} {cf_duty}{cf_list}",
    ],
    "cf_end": ["", " {cf_return}", " {survive}"],
    "cf_def": [
        "\"Confidential Information\" [2:means|includes] [all|any] [2:information|non-public "
            "information|technical and business information] [disclosed|furnished|made available] "
            "by {p} [to {q}|in connection with {agr}|under {agr}][3:|, whether [orally or in "
            "writing|in oral or written form]|, in any form].",
    ],
    "cf_duty": [
        "3:{^q} {mod} [hold|keep|maintain] [the|all] Confidential Information in [strict "
            "|]confidence and {mod} not disclose [it|the Confidential Information] to {third} "
            "without the {prior} consent of {p}.",
        "2:{^q} {q agrees agree} not to [use|disclose or use] the Confidential Information [for "
            "any purpose other than|except for] the [performance|purposes] of {agr}.",
        "{^q} {mod} protect the Confidential Information [of {p} |]with [2:the same degree of "
            "care|at least reasonable care|no less than reasonable care][ that {q} {q uses use} "
            "for {q its their} own information|].",
    ],
    "cf_duty2": [
        "Each party {mod} [2:keep|hold] the terms of {agr} [2:confidential|in confidence] and "
            "{mod} not disclose them to {third}, {except}.",
        "Neither party {mod} disclose the Confidential Information of the other "
            "party[, {except}|].",
    ],
    "cf_exc": [
        "Confidential Information does not include [any |]information that {list:cf_item}",
        "The obligations of {q} under this Section {mod} not apply to information that "
            "{list:cf_item}",
    ],
    "cf_list": [" {^q} may disclose Confidential Information only {list:cf_allowed}"],
    "cf_item": [
        "is or becomes [publicly available|generally available to the public][ through no "
            "fault of {q}|]",
        "was [already |]known to {q} [before|prior to] [its |]disclosure",
        "is [independently |]developed by {q}[ without use of the Confidential Information|]",
        "is [lawfully |rightfully |]received from a third party[ without restriction|]",
        "is required to be disclosed by [law|court order|{law}]",
    ],
    "cf_allowed": [
        "to {q its their} employees who need to know it",
        "as required by [law|court order]",
        "with the {prior} consent of {p}",
        "to {q its their} legal and financial advisors",
    ],
    "cf_return": [
        "Upon [2:termination of {agr}|the request of {p}|the written request of {p}], {q} {mod} "
            "[promptly |][return|destroy|return or destroy] all Confidential Information[| within "
            "{days} days].",
    ],

    # Indemnification
    "Indemnification": ["3:{in1}[| {in2}| {in3}| {in2} {in3}]", "{in4}[| {in2}]"],
    "in1": [
        "3:{op_p} {mod} [indemnify and hold harmless|indemnify, defend and hold harmless|defend "
            "and indemnify] {q}[ and {officers}|] from and against {claims}[| (including "
            "{counsel})] arising [out of|from|out of or relating to] [2:any breach [by {p} of "
            "{agr}|of {agr} by {p}]|any [act or omission|negligence|willful misconduct] of {p}].",
        "{^p} {p agrees agree} to indemnify {q} against {claims} [incurred|suffered] by {q} [as a "
            "result of|arising from|in connection with] [any breach of {agr} by {p}|the negligence "
            "of {p}|any [claim|action] brought by a third party].",
    ],
    "in2": [
        "{^q} {mod} [promptly |]notify {p} [in writing |]of any claim[ for which {q} {q seeks "
            "seek} indemnification| under this Section].",
        "{^q} {mod} give {p} [prompt |][written |]notice of any claim within {days} days after "
            "[receipt of the claim|{q} {q becomes become} aware of the claim].",
    ],
    "in3": [
        "{^p} {mod} [have [sole |]control of|control] the defense [and settlement |]of [any "
            "such|the] claim, and {q} {mod} cooperate [fully |][with {p}|in the defense].",
        "{^p} {mod} not settle any [such |]claim without the {prior} consent of {q}.",
        "{survive}",
    ],
    "in4": [
        "Each party (the \"Indemnifying Party\") {mod} indemnify the other party (the "
            "\"Indemnified Party\") against {claims} arising [out of|from] [any breach of {agr} "
            "by|the negligence of] the Indemnifying Party. The Indemnified Party {mod} [promptly "
            "notify|give prompt notice to] the Indemnifying Party of any [such |]claim.",
    ],

    # Term and termination
    "Term and Termination": ["2:{tt1} {tt2}[| {tt3}| {tt4}| {tt3} {tt4}]", "{tt1}[ {tt4}|]"],
    "Termination": ["2:{tt2}[| {tt3}| {tt4}| {tt3} {tt4}]", "{tt3}[| {tt4}]"],
    "Term": ["{tt1}[| {tt5}]"],
    "tt1": [
        "The [initial |]term of {agr} {mod} [begin|commence] on [2:the Effective Date|{date}] and "
            "[{mod} |]continue for [a period of |]{t=years}[2:|, unless [sooner|earlier] "
            "terminated as provided [herein|in {ref}]].",
        "{^agr} {mod} [become effective|take effect] on [2:{date}|the Effective Date] and {mod} "
            "remain in [force|effect|full force and effect] for [a term of |]{t=years}.",
    ],
    "tt2": [
        "2:Either party may terminate {agr} [at any time |for any reason |]upon {d=days} days' "
            "[3:{wn} |]notice to the other party.",
        "{^p} may terminate {agr} [at any time |]by giving {q} [at least |not less than |]{d=days} "
            "days' {wn} notice.",
    ],
    "tt3": [
        "2:{^p} may terminate {agr} [immediately |][upon written notice |]if {q} {q commits "
            "commit} {material} of {agr} and {q does do} not cure [it|the breach|such breach] "
            "within {c=days} days after [receipt of |][written |]notice[ from {p}|].",
        "If [either|a] party {breach} and [the|such] [default|breach|failure] is not "
            "[cured|remedied] within {c=days} days after [written |]notice, the other party may "
            "terminate {agr}.",
        "Either party may terminate {agr} if the other party [becomes insolvent|files a petition "
            "in bankruptcy|makes an assignment for the benefit of creditors].",
    ],
    "tt4": [
        "[Upon|After] [the |][termination|expiration] of {agr}, {q} {mod} [pay {p} all amounts "
            "[then due|due under {agr}]|return [to {p} |]all property of {p}|cease all use of the "
            "[Products|Services|Property]].",
        "Termination [of {agr} |]{mod} not [affect|relieve either party of] any [rights or "
            "|]obligations [accrued|that accrued] before the [date|effective date] of termination.",
    ],
    "tt5": [
        "{^agr} {mod} [automatically |]renew for [successive|additional] [terms|periods] of "
            "{years} unless either party gives [written |]notice of non-renewal at least {days} "
            "days before the end of the [then current |]term.",
    ],

    # Notices
    "Notices": ["3:{no1} {no2}[| {no3}]", "{no1}[| {no3}]"],
    "no1": [
        "All notices [2:required or permitted |]under {agr} {mod} be [2:in writing|given in "
            "writing] and {mod} be [3:delivered|sent] [personally|by hand|by certified mail|by "
            "courier][, by certified mail|, by overnight courier| or by electronic mail|] to the "
            "address [of the receiving party|set forth [below|in {ref}|above]].",
        "Any notice [to be given |]under {agr} {mod} be [effective|valid] only if it is in writing "
            "and [delivered|addressed] to the [other|receiving] party.",
    ],
    "no2": [
        "[Notice|A notice|Any notice] {mod} be deemed [given|received|effective] [2:{days} days "
            "after [mailing|it is mailed|deposit in the mail]|upon [receipt|delivery]|on the next "
            "business day after it is sent].",
    ],
    "no3": [
        "[Either|A] party may change its address [for notices |]by [written |]notice to the other "
            "party[ in accordance with this Section|].",
    ],

    # Assignment
    "Assignment": ["2:{as1}[| {as2}| {as3}| {as2} {as3}]", "{as4} {as3}"],
    "as1": [
        "2:Neither party may assign {agr}[| or any [right|interest] [under it|in it]] without the "
            "{prior} consent of the other party.",
        "2:{^p} {mod} not assign [or transfer |]{agr}[| or any of {p its their} rights [or "
            "obligations |]under {agr}] without the {prior} consent of {q}[|, which consent {mod} "
            "not be unreasonably withheld].",
        "{^agr} may not be assigned by {p} [in whole or in part |]without the {prior} "
            "consent of {q}.",
    ],
    "as2": [
        "Any [attempted |purported ]assignment in violation of this [2:Section|provision] {mod} be "
            "[2:void|null and void|of no effect].",
    ],
    "as3": [
        "{^agr} {mod} be binding [upon|on] and {mod} inure to the benefit of the parties and their "
            "[respective |permitted |][successors and assigns|heirs, successors and assigns].",
    ],
    "as4": [
        "{^q} may assign {agr} [2:to [any affiliate|an affiliate|a successor]|in connection "
            "with [a merger|the sale of {q its their} business]] without the consent of {p}[|, "
            "{if_notice}].",
    ],
    "if_notice": [
        "provided that {q} {q gives give} {p} {days} days' {wn} notice",
        "if {q} {q gives give} {p} {wn} notice",
    ],

    # Severability, waiver, entire agreement, amendment
    "Severability": ["3:{se1}[| {se2}]"],
    "se1": [
        "If any [2:provision|term|term or provision] of {agr} is [held|found|determined] [by a "
            "court |]to "
            "be [2:invalid or unenforceable|invalid, illegal or unenforceable|unenforceable], the "
            "[remaining provisions|other provisions] [of {agr} |]{mod} [2:remain in full force and "
            "effect|continue in full force and effect|not be affected].",
        "The [invalidity|unenforceability|illegality] of any provision of {agr} {mod} not affect "
            "[2:any other provision|the validity of the remaining provisions].",
    ],
    "se2": [
        "The parties {mod} [negotiate in good faith to |]replace [the|any] [invalid|unenforceable] "
            "provision with a valid provision that [2:reflects|comes closest to] [their original "
            "intent|the intent of the parties].",
        "The [court|parties] may [modify|reform] the provision to the [minimum |]extent necessary "
            "to make it [enforceable|valid].",
    ],
    "Waiver": ["{wa1}[| {wa2}]"],
    "wa1": [
        "No waiver of [2:any|a] [provision|term] of {agr} {mod} be [effective|valid] unless it "
            "is {writing}.",
        "No [failure|delay|failure or delay] [by|of] [2:either party|{p}] in exercising any right "
            "under {agr} {mod} [operate|be deemed to operate] as a waiver[ of that right|].",
    ],
    "wa2": [
        "A waiver of any [breach|default] {mod} not [be deemed|constitute] a waiver of any "
            "[other|subsequent|later] [breach|default].",
    ],
    "Entire Agreement": ["3:{ea1}[| {ea2}]"],
    "ea1": [
        "2:{^agr}[|, together with [its|the] exhibits,] [3:constitutes|sets forth|contains] the "
            "entire [agreement|understanding|agreement and understanding] [2:between|of] the "
            "parties [with "
            "respect to|concerning|regarding|relating to] [its subject matter|the subject matter "
            "[hereof|of {agr}]][2: and supersedes all prior [agreements|negotiations|agreements "
            "and understandings|discussions][, whether written or oral|]|].",
    ],
    "ea2": [
        "{am1}",
        "[No|There are no] [representations|promises|other agreements] [2:have been made|between "
            "the parties] [except|other than] [those |as ]set forth in {agr}.",
    ],
    "Amendment": ["{am1}[| {wa1}]"],
    "am1": [
        "{^agr} may [2:be amended|be amended or modified|not be amended except|be modified] [only "
            "|]{writing}.",
        "No [2:amendment|modification|change] [of|to] {agr} {mod} be [2:binding|effective|valid] "
            "unless [made |]{writing}.",
    ],

    # Force majeure
    "Force Majeure": ["{fm1}[| {fm2}| {fm3}| {fm2} {fm3}]"],
    "fm1": [
        "2:Neither party {mod} be [liable|responsible] for any [delay or failure|failure or "
            "delay|failure] [in performance|to perform][ under {agr}|] [caused by|due to|resulting "
            "from] [events|circumstances|causes] beyond its [reasonable |]control, including "
            "{fm_events}.",
        "{^p} {mod} not be in [breach|default] of {agr} if {p its their} performance is "
            "[delayed|prevented] by {fm_events} or any other [event|cause] beyond the [reasonable "
            "|]control of {p}.",
    ],
    "fm_events": [
        "[2:acts of God|fire|flood], [war|strikes|riots|earthquakes], [2:terrorism|labor "
            "disputes|epidemics|acts of government]",
        "[fire|flood|war|strikes], [accidents|epidemics|storms] and [acts of God|acts of "
            "government|labor disputes]",
    ],
    "fm2": [
        "The affected party {mod} [promptly |]notify the other party [of|in writing of] the "
            "[event|delay|cause of the delay][| within {days} days] and {mod} use "
            "[reasonable|diligent|its best] efforts to [resume performance|limit the delay].",
    ],
    "fm3": [
        "If [the|such] [delay|event|failure] continues for more than {days} days, [either "
            "party|the other party|{q}] may terminate {agr}[ upon written notice|].",
    ],

    # Payment
    "Payment": ["2:{pa1}[| {pa2}| {pa3}| {pa2} {pa3}]", "{pa1} {pa4}[| {pa2}]"],
    "Payment Terms": ["{pa1} {pa2}[| {pa3}]"],
    "pa1": [
        "2:{^q} {mod} pay [to |]{p} [2:the sum of|a [total |]fee of|an amount equal to] {x=money} "
            "[2:within {d=days} days after [2:receipt of [an|each] invoice|the Effective Date|the "
            "date of {agr}]|on the first day of each [month|calendar month]|on or before {date}].",
        "{^p} {mod} invoice {q} [monthly|quarterly|on the last day of each month], and {q} {mod} "
            "pay each invoice within {d=days} days after [receipt|the date of the invoice].",
        "In consideration of the [Services|Products|rights granted under {agr}], {q} {mod} pay [to "
            "|]{p} {x=money}[|, [payable in {n=few} equal installments|in {n=few} equal "
            "installments]].",
    ],
    "pa2": [
        "[Any amount|Amounts] not paid when due {mod} bear interest at [2:the rate of {percent} "
            "per [annum|year|month]|the lesser of {percent} per month and the maximum rate "
            "permitted by {law}].",
        "If {q} {q fails fail} to pay any amount [when due|when it is due|within such period], {p} "
            "may [suspend performance|charge a late fee of {money}|terminate {agr}].",
    ],
    "pa3": [
        "All [payments|amounts due] under {agr} {mod} be made in [United States "
            "dollars|immediately available funds][ without [set-off|deduction]|].",
        "{^q} {mod} [be responsible for|pay] all [applicable |]taxes[, other than taxes on the "
            "income of {p}| arising from {agr}|].",
    ],
    "pa4": [
        "{^p} {mod} keep [complete and accurate|accurate] [books and |]records, and {q} may "
            "[inspect|audit] [them|such records] upon {days} days' notice.",
    ],

    # Warranties
    "Warranties": ["2:{wr1}[| {wr2}| {wr3}| {wr2} {wr3}]", "{wr_list}[| {wr3}]"],
    "Representations and Warranties": ["2:{wr_list}[| {wr3}]", "{wr1}[| {wr2}]"],
    "wr1": [
        "{^p} [2:{p represents represent} and {p warrants warrant}|{p warrants warrant}] [to {q} "
            "|]that the [2:Products|Services|Goods] {mod} [conform to "
            "the specifications|be free from defects in [material|materials] "
            "and workmanship|be performed in a [professional|workmanlike] manner][| "
            "for a period of {months} [after|from] [delivery|the date of delivery]].",
    ],
    "wr_list": [
        "{^p} {p represents represent} and {p warrants warrant} to {q} that {list:wr_item_p}",
        "Each party represents and warrants [2:to the other party |]that {list:wr_item}",
    ],
    "wr_item": [
        "it has [the |][full |][right, power and authority|power and authority|authority] to "
            "enter into {agr}",
        "{agr} is a [legal, valid and binding|valid and binding] obligation[, enforceable in "
            "accordance with its terms|]",
        "no consent of {third} is required",
        "there is no [action|claim|proceeding] pending [or threatened |]against it",
        "it is [duly organized and |][validly existing|in good standing] under the laws of the "
            "State of {STATE}",
    ],
    "wr_item_p": [
        "{p it they} {p has have} [the |][full |][right, power and authority|power and "
            "authority|authority] to enter into {agr}",
        "{agr} is a [legal, valid and binding|valid and binding] obligation[, enforceable in "
            "accordance with its terms|]",
        "no consent of {third} is required",
        "there is no [action|claim|proceeding] pending [or threatened |]against {p it them}",
        "{p it they} {p is are} [duly organized and |][validly existing|in good standing] under "
            "the laws of the State of {STATE}",
    ],
    "wr2": [
        "The sole remedy of {q} for [breach of this warranty|any breach of this Section] {mod} be "
            "[the repair or replacement of the [defective |]Products|a refund of the "
            "amounts paid].",
    ],
    "wr3": [
        "EXCEPT AS [EXPRESSLY |]SET FORTH IN THIS [SECTION|{UPPER}], {p_upper} {p MAKES MAKE} NO "
            "[OTHER |]WARRANTIES[, EXPRESS OR IMPLIED|, INCLUDING ANY WARRANTY OF MERCHANTABILITY| "
            "OF ANY KIND].",
    ],

    # Limitation of liability
    "Limitation of Liability": ["2:{ll1}[| {ll2}]", "{ll2}[| {ll3}]", "{ll1} {ll3}"],
    "ll1": [
        "IN NO EVENT {MODAL_UPPER} [2:EITHER PARTY|{p_upper}|{p_upper}] BE LIABLE[| TO THE OTHER "
            "PARTY] FOR ANY [INDIRECT, |]INCIDENTAL[, SPECIAL|] OR CONSEQUENTIAL DAMAGES[ ARISING "
            "OUT OF THIS {UPPER}|][, INCLUDING [LOST PROFITS|LOSS OF PROFITS]|].",
        "Neither party {mod} be liable [to the other |]for any [indirect, |]incidental[, special|] "
            "or consequential damages[| arising out of {agr}][, including lost profits|][|, even "
            "if [it has been |]advised of the possibility of such damages].",
    ],
    "ll2": [
        "The [total |aggregate |]liability of {p} under {agr} {mod} not exceed [2:{money}|the "
            "[total |]amounts paid [by {q} |][under {agr}|during the preceding {months}]].",
    ],
    "ll3": [
        "The limitations [set forth |]in this Section {mod} not apply to [2:any breach of "
            "confidentiality|[fraud|gross negligence] or willful misconduct|the obligations of {p} "
            "to indemnify {q}].",
        "Nothing in {agr} {mod} limit the liability of {p} for [fraud|personal injury|death or "
            "personal injury].",
    ],

    # Definitions
    "Definitions": [
        "As used in {agr}, the following terms {mod} have the following "
            "meanings:{deflist:def_item}",
        "2:[For purposes of|In] {agr}, the following definitions [{mod} |]apply:{deflist:def_item}",
    ],
    "def_item": [
        "\"Affiliate\" means any [entity|person] that [controls, is controlled by or is under "
            "common control with|directly or indirectly controls] a party",
        "\"Business Day\" means any day other than a Saturday, a Sunday or [a public holiday|a "
            "holiday][ in the State of {STATE}|]",
        "\"Effective Date\" means {date}",
        "\"Products\" means the [products|goods] [described|listed] in [Exhibit "
            "A|{ref}|Schedule 1]",
        "\"Services\" means the services [described|listed] in [Exhibit A|{ref}|Schedule 1][ to be "
            "performed by {p}|]",
        "\"Territory\" means the [State of {STATE}|United States of America|States of {STATE} "
            "and {state2}]",
        "\"Purchase Price\" means {money}",
        "\"Losses\" means {claims}",
        "\"Person\" means [any individual, corporation or partnership|an individual or a "
            "legal entity]",
        "\"Intellectual Property\" means all [patents, trademarks and copyrights|patents, "
            "copyrights and trade secrets]",
        "\"Term\" means the period [beginning|commencing] on the Effective Date and "
            "ending on {later}",
        "\"Confidential Information\" means all non-public information [disclosed by either "
            "party|of {p}]",
    ],

    # Insurance, independent contractor, dispute resolution, counterparts, property
    "Insurance": [
        "{^q} {mod} [obtain and |]maintain[, at {q its their} [own|sole] expense,|] [2:commercial "
            "general liability insurance|liability insurance|property insurance] with "
            "[limits|coverage] of [at least|not less than] {money} [2:per occurrence|for each "
            "claim|in the aggregate][ during the term of {agr}|].[| {is2}]",
    ],
    "is2": [
        "[Upon request, |]{^q} {mod} [furnish|provide|deliver] [to |]{p} [2:a "
            "certificate|certificates] of insurance[| within {days} days].",
        "Each policy {mod} [name {p} as an additional insured|provide for {days} days' notice of "
            "cancellation].",
    ],
    "Relationship of the Parties": ["2:{ic1}[| {ic2}]"],
    "Independent Contractor": ["{ic1} {ic2}"],
    "ic1": [
        "[2:The parties are independent contractors[| and not partners]|{^q} {q is are} not the "
            "agent of {p}], and nothing in {agr} {mod} [create|be deemed to create|be construed as "
            "creating] [a partnership|a joint venture|an employment relationship|a partnership or "
            "joint venture][ between the parties|].",
        "Nothing in {agr} {mod} [create|be construed to create] [a partnership|a joint venture|an "
            "agency relationship] between {p} and {q}.",
    ],
    "ic2": [
        "[2:Neither party {mod} have [any |]authority to bind the other|{^q} {q does do} not have "
            "[any |]authority to bind {p}] [in any manner|without {prior} consent].",
    ],
    "Dispute Resolution": ["{dr1} {dr2}[| {dr3}]", "{dr2}[| {dr3}]"],
    "Arbitration": ["{dr2}[| {dr3}| {gl3}]"],
    "dr1": [
        "The parties {mod} [2:attempt|use good faith efforts] to resolve any dispute [arising "
            "under {agr} |][2:by negotiation|through mediation|by good faith negotiation][| within "
            "{days} days].",
    ],
    "dr2": [
        "Any [dispute|controversy or claim] [arising [under|out of]|relating to] {agr} {mod} be "
            "[2:settled|finally resolved|resolved] by [binding |]arbitration in {CITY}, {STATE}[, "
            "before [one arbitrator|a single arbitrator|three arbitrators]|].",
    ],
    "dr3": [
        "The decision of the [arbitrator|arbitrators] {mod} be final and binding[ on "
            "the parties|].",
        "[Each party {mod} bear its own costs|The costs of the arbitration {mod} be shared equally "
            "by the parties].",
    ],
    "Counterparts": [
        "{^agr} may be [executed|signed] in [2:any number of|two or more|several] counterparts, "
            "each of which {mod} be [2:deemed |]an original[2: and all of which [together |]{mod} "
            "constitute one [and the same |]instrument|].[| {ct2}]",
    ],
    "ct2": [
        "[Signatures|Copies] [delivered|sent] by [electronic mail|facsimile] {mod} be [2:deemed "
            "|]{as_originals}.",
    ],
    "as_originals": ["[binding|effective|valid] as originals", "originals"],
    "License Grant": [
        "[Subject to [the terms of {agr}|{ref}], {p}|2:{^p}] [hereby |]{p grants grant} [to |]{q} "
            "[2:a non-exclusive|a limited, non-exclusive|an exclusive], "
            "[non-transferable|revocable|royalty-free] [right and |]license to use the "
            "[2:Software|Licensed Marks|Intellectual Property][| [in the State of {STATE}|during "
            "the term of {agr}|for {q its their} internal business purposes]].[| {lg2}]",
    ],
    "lg2": [
        "{^q} {mod} not [2:copy, modify or distribute|sublicense|sell or transfer] the "
            "[Software|Intellectual Property][| without the {prior} consent of {p}].",
        "[All rights not [expressly |]granted|Title to the Intellectual Property] {mod} "
            "remain with {p}.",
    ],

    # Opening of an agreement
    "preamble": [
        "2:This {AGR} [(this \"{AGR}\") |]is [2:made|entered into|made and entered into] [as "
            "of|on] {date}[2: (the \"Effective Date\")|][, by and between| by and between|, "
            "between| between] {party_a} (the \"{A}\") and {party_b} ({b_the}\"{B}\").",
        "This {AGR}, dated [as of |]{date}[ (the \"Effective Date\")|], is [by and "
            "between|between] {party_a} (the \"{A}\") and {party_b} ({b_the}\"{B}\").",
        "This {AGR} sets forth the [2:terms of the relationship|agreement|rights and obligations] "
            "of {A.} and {B.}.",
    ],
    "recitals": [
        "WHEREAS, {A.} {A wishes wish} to [engage|contract with|do business with] {B.}; and\n"
            "WHEREAS, {B.} {B is are} [willing|prepared] to [accept the terms of {agr}|perform {B "
            "its their} obligations under {agr}];\nNOW, THEREFORE, the parties agree as follows:",
        "3:The parties [hereby |]agree as follows:",
        "In consideration of the mutual [promises|covenants] [contained herein|in {agr}], the "
            "parties agree as follows:",
    ],
    "company": ["{cname1} {cname2} [2:Inc.|LLC|Corp.|Company|L.P.]"],
    "cname1": ["2:Northern", "Summit", "Pacific", "Atlantic", "Granite", "Harbor", "Cedar",
        "Liberty", "Pioneer", "Evergreen", "Sterling", "Lakeside", "Crescent", "Falcon", "Meridian",
        "Oak", "River", "Silver"],
    "cname2": ["Holdings", "Foods", "Energy", "Systems", "Logistics", "Capital", "Partners",
        "Industries", "Media", "Software", "Properties", "Medical", "Steel", "Trading"],

    # Statutes
    "st_terms": ["[2:As used in this Act|In this Act|For purposes of this Act][, the following "
                 "terms have the following meanings|]:"],
    "st_each": ["[3:Each|Every] {who} shall"],
    "st_also": ["[The|2:Each] {who} shall[ also|]"],
    "st_no": ["No {who} [2:may|shall] [2:fail|refuse] to {duty}."],
    "act_exempt": ["This Act [does|shall] not apply to {list:exempt}"],
    "st_exempt": ["[This section|Subsection {first}] [does|shall] not apply to {list:exempt}"],
    "penalty": [
        "Any {who} [2:who|that] [2:violates|knowingly violates|fails to comply with] "
            "[3:subsection {first}|this section] {punished}.",
    ],
    "punished": [
        "2:is guilty of a [2:misdemeanor|felony] and shall be fined not more than {money}[2:| or "
            "imprisoned for not more than {years}, or both]",
        "2:is [subject to|liable for] a civil penalty of not more than {money}[| for "
            "each violation]",
        "shall be [fined|punished by a fine of] not [more than|less than {money} nor more "
            "than] {bigmoney}",
    ],
    "exempt": [
        "an agency of the [State|United States|federal government]",
        "a [bank|credit union|nonprofit organization] [organized|chartered] under the laws of "
            "[this State|the United States]",
        "a person who [acts|relied] in good faith",
        "any person with fewer than {few} employees",
    ],
    "duty": [
        "[obtain a [license|permit] from|file a report with|register with] the "
            "[department|commissioner|board][| at least {days} days before [beginning "
            "business|any change]]",
        "[keep|maintain] [complete and accurate|accurate] records for [not less than |at "
            "least ]{years}",
        "[give|provide] written notice to [each affected person|the department|the public] "
            "within {days} days",
        "pay [to the department |]an annual fee of {money}",
        "[post a bond|deposit security] in the amount of {money}",
    ],
    "rules": [
        "The [department|commissioner|board] {mod} [adopt|promulgate] rules [2:to "
            "[implement|administer|carry out] this [section|Act]|necessary to carry out this "
            "[section|Act]][| not later than {date}].",
    ],

    # Notices of rulemaking
    "RULE": ["3:proposed rule", "final rule"],
    "action": [
        "[amend|revise] its [regulations|rules] [on|for|governing|concerning] {things}",
        "[establish|issue|adopt] [new |][standards|requirements|reporting requirements] "
            "for {things}",
        "[withdraw|update] its [guidance|policy] on {things}",
    ],
    "must": [
        "[submit|file] [a report|an application|a certification] to {ACR} [2:within {days} days "
            "[after|of] [the effective date|the date of the event|receipt of notice]|not later "
            "than {date}|each calendar year]",
        "[keep|maintain|retain] records for [at least |not less than |]{years}",
        "notify {ACR} [in writing |]within {days} days [after|of] any [change|violation|accident]",
        "[comply|be in compliance] with [the {LAW}|the [safety|reporting] requirements of this "
            "part][| on or before {date}]",
        "[conduct|perform] [an inspection|a test|an audit] every {months}",
        "pay a fee of {money}",
        "[obtain|hold] a [permit|license|certificate] [issued by {ACR}|before operation]",
    ],
    "comments": ["Comments must be [2:received|submitted] on or before"],
    "effective": ["This [rule|action] is effective [on|as of]"],
    "supplement": ["[|SUPPLEMENTARY INFORMATION: {under}[| {shallnot}][| {estimate}]\n]"],
    "summary": ["The {AGENCY} ({ACR}) {proposes} to {action}."],
    "because": [
        "This [action|{short}] is [necessary|needed|intended] to [2:protect [the public "
            "health|consumers|public safety|the environment]|reduce [costs|the burden on small "
            "entities|delays]|improve [safety|compliance|reporting]|implement the {LAW}].",
    ],
    "estimate": [
        "{ACR} estimates that [the {RULE}|this action] {would} [cost|save] [affected parties|small "
            "entities|the industry] [about|approximately] {bigmoney} [per|each] year.",
    ],
    "small": [
        "{ACR} [certifies|has determined] that this [{short}|action] {would} not have a "
            "significant economic impact on a substantial number of small entities.",
    ],
    "under": [
        "3:Under this [4:{RULE}|section|part], [2:the [3:agency|Agency] must "
            "{agency_must}|[each|any] {x=person} must {must}[2:|, unless {unless}]].",
        "Under this [3:{RULE}|part|section], {things} must {things_must}.",
        "Under {cfr}, [each|any] {person} must {must}.",
    ],
    "agency_must": [
        "[2:determine|assess|consider] the [effect|impact|effects] of {its_rule} on [2:State, "
            "local, and Tribal governments|small entities|the public|the environment]",
        "[publish|issue] [2:a notice|its findings] in the Federal Register [within {days} days|not "
            "later than {date}|before any final action]",
        "[review|act on|approve or deny] [each|an] application within {days} days "
            "[after|of] receipt",
        "[consult with|give notice to] [State and local governments|affected parties|the public] "
            "[before any final action|concerning {its_rule}]",
        "[prepare|complete] [an environmental assessment|an analysis of costs and benefits|a "
            "regulatory impact analysis][| within {months}]",
    ],
    "its_rule": ["2:the rule", "this action", "{things}"],
    "things_must": [
        "[2:meet the requirements of|comply with] {cfr}",
        "be [inspected|reviewed] every {months}",
        "be [identified|reported|recorded] in accordance with {cfr}",
    ],
    "person_goods": ["2:person", "3:manufacturer", "importer", "2:distributor", "applicant"],
    "person_else": ["2:person", "applicant", "licensee", "2:operator", "owner or operator"],
    "unless": [
        "{ACR} [grants a waiver|determines otherwise|approves an extension]",
        "the {x} is a small entity",
    ],
    "no_goods": [
        "No {person} may [2:sell|distribute|offer for sale|import] {things} that [2:do not "
            "comply|are not in compliance] with {cfr}.",
    ],
    "no_else": [
        "No {person} may [2:operate|engage in business] [2:in violation of {cfr}|without a "
            "[permit|license][ issued by {ACR}|]].",
    ],
    "regulated": [
        "3:{^things} are regulated by the {AGENCY} ({ACR}) under [2:{cfr}|the {LAW}][2:|, as "
            "amended[| on {date}]].",
        "The {AGENCY} ({ACR}) regulates {things} under [{cfr}|the {LAW}].",
    ],
}

HEADINGS = ["5:Governing Law", "4:Confidentiality", "3:Indemnification", "2:Term and Termination",
            "2:Termination", "1:Term", "3:Notices", "3:Assignment", "3:Severability", "Waiver",
            "3:Entire Agreement", "Amendment", "3:Force Majeure", "2:Payment", "Payment Terms",
            "2:Warranties", "Representations and Warranties", "3:Limitation of Liability",
            "2:Definitions", "2:Insurance", "Relationship of the Parties", "Independent Contractor",
            "Dispute Resolution", "Arbitration", "Counterparts", "2:License Grant"]

# One of these in a document is enough.
KIN = [("Term", "Termination", "Term and Termination"), ("Payment", "Payment Terms"),
       ("Waiver", "Amendment"), ("Warranties", "Representations and Warranties"),
       ("Relationship of the Parties", "Independent Contractor"),
       ("Dispute Resolution", "Arbitration")]


# ---- The composer -----------------------------------------------------------------------------

def weighted(options):
    """[(weight, text)] of options that may begin with a weight and a colon."""
    found = []
    for option in options:
        weight, text = re.fullmatch(r"(?:(\d+):)?(.*)", option, re.S).groups()
        found.append((int(weight or 1), text))
    return found


@functools.lru_cache(maxsize=None)
def parse(template):
    """A template as a list of strings, [name] slots and ((weight, text), ...) choices."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(template):
        if c in "[{":
            if depth == 0:
                if i > start:
                    parts.append(template[start:i])
                start = i + 1
            depth += 1
        elif c in "]}":
            depth -= 1
            if depth == 0:
                inside, start = template[start:i], i + 1
                if c == "}":
                    parts.append([inside])
                else:
                    parts.append(tuple(weighted(split_options(inside))))
    assert depth == 0, template
    if start < len(template):
        parts.append(template[start:])
    return parts


def split_options(text):
    """Cut at the bars outside of inner brackets."""
    options, depth = [""], 0
    for c in text:
        depth += (c in "[{") - (c in "]}")
        if c == "|" and depth == 0:
            options.append("")
        else:
            options[-1] += c
    return options


RULES = {name: tuple(weighted(options)) for name, options in RULES.items()}
ROLES = {name: tuple(weighted(options)) for name, options in ROLES.items()}
HEADINGS = tuple(weighted(HEADINGS))


def capital(text):
    return text[:1].upper() + text[1:]


class Composer:
    def __init__(self, rng):
        self.rng = rng

    # Choices. Each adds its information to self.nats.

    def choose(self, options):
        """One of [(weight, text)]."""
        if len(options) == 1:
            return options[0][1]
        total = sum(weight for weight, _ in options)
        at = self.rng.random() * total
        for weight, text in options:
            at -= weight
            if at < 0:
                break
        self.nats -= math.log(weight / total)
        return text

    def pick(self, options):
        return self.choose([(1, option) for option in options])

    def expand(self, template):
        out = []
        for part in parse(template):
            if isinstance(part, str):
                out.append(part)
            elif isinstance(part, tuple):
                out.append(self.expand(self.choose(part)))
            else:
                out.append(self.slot(part[0]))
        return "".join(out)

    def slot(self, name):
        """What stands for {name}."""
        if name.startswith("^"):
            return capital(self.slot(name[1:]))
        if "=" in name:
            name, rule = name.split("=")
            self.local[name] = text = self.slot(rule)
            return text
        if ":" in name:
            kind, rule = name.split(":")
            return getattr(self, "do_" + kind)(rule)
        if name in ("A.", "B."):
            return self.called(name[0])
        if " " in name and name not in RULES:
            party, one, many = name.split()
            return many if self.party(party).endswith("s") else one
        if name in self.local:
            return self.local[name]
        method = getattr(self, "do_" + name, None)
        if method:
            return method()
        if name.isupper():
            if name not in self.fixed:
                self.fixed[name] = self.expand(self.choose(RULES[name]))
            return self.fixed[name]
        return self.expand(self.choose(RULES[name]))

    # Parties: A and B are the document's, p and q the same two in this section's order

    def party(self, name):
        if name in ("p", "q"):
            if "p" not in self.order:
                swap = self.choose(((1, ""), (1, "swap")))
                self.order = {"p": "BA"[not swap], "q": "AB"[not swap]}
            name = self.order[name]
        if "A" not in self.fixed:
            pair = self.choose(ROLES[self.slot("AGR")])
            self.fixed["A"], self.fixed["B"] = pair.split("/")
        return self.fixed[name]

    def called(self, name):
        """the Seller, or just Seller, as this document does it."""
        role = self.party(name)
        if "article" not in self.fixed:
            self.fixed["article"] = self.choose(((3, "the "), (1, "")))
        return self.fixed["article"] + role

    def do_p(self):
        return self.called("p")

    def do_q(self):
        return self.called("q")

    def do_A(self):
        return self.party("A")

    def do_B(self):
        return self.party("B")

    def do_p_upper(self):
        return self.called("p").upper()

    def do_UPPER(self):
        return self.slot("AGR").upper()

    def do_MODAL_UPPER(self):
        return self.slot("MODAL").upper()

    def do_b_the(self):
        return "together, the " if self.party("B").endswith("s") else "the "

    def party_text(self, name):
        """Companies with the law they are organized under; two where the party is plural."""
        company = self.slot("company")
        kind = {"Inc.": "corporation", "Corp.": "corporation", "LLC": "limited liability company",
                "L.P.": "limited partnership", "Company": "company"}[company.split()[-1]]
        state = self.slot("STATE") if name == "A" else self.choose(RULES["STATE"])
        if self.party(name).endswith("s"):
            other = self.slot("company")
            return "%s and %s, each a company organized in %s" % (company, other, state)
        article = "an" if state[0] in "IO" else "a"
        return "%s, %s %s %s" % (company, article, state, kind)

    def do_party_a(self):
        return self.party_text("A")

    def do_party_b(self):
        return self.party_text("B")

    # Places, numbers, dates

    def do_COUNTY(self):
        return PLACES[self.slot("STATE")][0]

    def do_CITY(self):
        return PLACES[self.slot("STATE")][1]

    def do_state2(self):
        return self.pick([state for state in PLACES if state != self.slot("STATE")])

    def figure(self, n):
        return "%s (%d)" % (in_words(n), n)

    def do_days(self):
        return self.figure(self.choose(((2, 5), (4, 10), (3, 15), (2, 20), (8, 30), (3, 45),
                                        (5, 60), (4, 90), (1, 7), (1, 14), (1, 120), (1, 180))))

    def do_months(self):
        return (self.figure(self.choose(((3, 6), (4, 12), (2, 18), (2, 24), (1, 36), (2, 3))))
                + " months")

    def do_years(self):
        n = self.choose(((3, 1), (3, 2), (4, 3), (4, 5), (1, 4), (1, 7), (2, 10), (1, 20)))
        return self.figure(n) + (" year" if n == 1 else " years")

    def do_percent(self):
        n = self.choose(((1, 2), (1, 3), (2, 4), (4, 5), (2, 6), (2, 8), (3, 10), (2, 12)))
        return "%s percent (%d%%)" % (in_words(n), n)

    def amount(self, scale):
        n = scale * self.choose(((4, 1), (3, 2), (1, 3), (4, 5), (2, 10), (1, 15), (2, 25),
                                 (2, 50), (1, 75)))
        style = self.fixed.get("money")
        if style is None:
            style = self.fixed["money"] = self.choose(((2, "figures"), (1, "words")))
        if style == "figures":
            return "${:,}".format(n)
        return "%s dollars ($%s)" % (in_words(n), "{:,}".format(n))

    def do_money(self):
        return self.amount(self.choose(((1, 100), (4, 1000), (2, 10000))))

    def do_bigmoney(self):
        return self.amount(self.choose(((1, 100000), (1, 1000000))))

    def do_date(self):
        """In the document's year, or the next."""
        if "year" not in self.fixed:
            years = ([(1, year) for year in range(1996, 2010)]
                     + [(2, year) for year in range(2010, 2025)])
            self.fixed["year"] = self.choose(years)
            return self.day_of(self.fixed["year"])
        return self.day_of(self.fixed["year"] + self.choose(((4, 0), (1, 1))))

    def do_later(self):
        if "year" not in self.fixed:
            return self.do_date()
        return self.day_of(self.fixed["year"] + self.choose(((2, 2), (2, 3), (2, 5), (1, 10))))

    def day_of(self, year):
        month = self.pick(list(MONTHS))
        last = MONTHS[month]
        day = self.choose([(2 * last if day in (1, last) else 1, day)
                           for day in range(1, last + 1)])
        return "%s %d, %d" % (month, day, year)

    # Numbering and references

    def several(self, rule, low, high):
        """Different items of a rule, in random order."""
        items = list(RULES[rule])
        count = self.pick(range(low, min(high, len(items)) + 1))
        found = []
        for _ in range(count):
            item = self.choose(items)
            items = [(weight, text) for weight, text in items if text != item]
            found.append(self.expand(item))
        return found

    def do_list(self, rule):
        """(a) one; (b) two; or (c) three."""
        items = self.several(rule, 2, 4)
        # Warranties add up, the others are cases.
        joint = "and" if rule.startswith("wr_item") else "or"
        marks = self.marks()
        out = ""
        for i, item in enumerate(items):
            end = ("." if i == len(items) - 1
                   else "; " + (joint + " " if i == len(items) - 2 else ""))
            out += "%s %s%s" % (marks[i], item, end)
        return out

    def do_deflist(self, rule):
        marks = self.marks()
        return "".join("\n%s %s." % (marks[i], item)
                       for i, item in enumerate(self.several(rule, 2, 4)))

    def marks(self):
        if "marks" not in self.fixed:
            self.fixed["marks"] = self.choose(((3, "a"), (2, "i"), (1, "1")))
        return {"a": ["(%s)" % c for c in "abcdefgh"], "i": ["(%s)" % r for r in ROMAN],
                "1": ["(%d)" % n for n in range(1, 9)]}[self.fixed["marks"]]

    def do_ref(self):
        """A section that exists: an earlier one, with its title now and then, else the whole."""
        earlier = [n for n in self.sections if n != self.section]
        if not earlier:
            return self.slot("agr")
        n = self.pick(earlier)
        return self.choose(((3, "Section %s" % n), (1, "Section %s (%s)" % (n, self.sections[n]))))

    # Documents

    def document(self):
        """(text, nats)"""
        self.nats, self.fixed = 0.0, {}
        self.local, self.order, self.sections, self.section = {}, {}, {}, None
        kind = self.choose(((36, "clauses"), (20, "numbered"), (14, "agreement"), (14, "statute"),
                            (16, "notice")))
        text = getattr(self, kind)()
        return text, self.nats

    def headings(self, low, high):
        options, found = list(HEADINGS), []
        for _ in range(self.pick(range(low, high + 1))):
            heading = self.choose(options)
            kin = next((group for group in KIN if heading in group), [heading])
            options = [(weight, text) for weight, text in options if text not in kin]
            found.append(heading)
        return found

    def section_text(self, heading):
        """The text of a contract's section. Who pays, warrants and licenses is not left to
        chance."""
        self.local, self.order = {}, {}
        if re.match("Payment|Warranties|Representations|License", heading):
            self.order = {"p": "A", "q": "B"}
        return self.slot(heading)

    def clauses(self):
        """Clauses under plain headings."""
        out = []
        for heading in self.headings(1, 3):
            out.append("%s.\n%s\n" % (heading, self.section_text(heading)))
        return "\n".join(out)

    def numbered(self, first=None):
        """Consecutive sections of a contract: 4., Section 4., or with paragraphs 4.1, 4.2."""
        style = self.choose(((3, "%d. %s.\n"), (2, "Section %d. %s.\n"), (2, "paragraphs")))
        n = first or self.choose([(3 if n == 1 else 1, n) for n in range(1, 15)])
        out = []
        for heading in self.headings(2, 3):
            self.section = str(n)
            self.sections[self.section] = heading
            if style == "paragraphs":
                body = self.section_text(heading)
                head, _, items = body.partition("\n")
                sentences = re.split(r"(?<=[a-z0-9A-Z)]\.) (?=[A-Z\"])", head)
                lines = ["%d.%d %s" % (n, i, s) for i, s in enumerate(sentences, 1)]
                out.append("%d. %s.\n%s\n%s"
                           % (n, heading, "\n".join(lines), items + "\n" if items else ""))
            else:
                out.append(style % (n, heading) + self.section_text(heading) + "\n")
            n += 1
        return "\n".join(out)

    def agreement(self):
        # The roles come before the sections, so that every section uses the defined names.
        opening = self.slot("preamble")
        recitals = self.slot("recitals")
        return opening + "\n" + recitals + "\n\n" + self.numbered(1)

    def statute(self):
        """A section of an act: definitions; or duties, penalties, exemptions and rules."""
        self.fixed.update(MODAL="shall", marks="1")
        act = self.pick(list(SUBJECTS))
        self.local["who"], terms = SUBJECTS[act]
        number = self.pick(range(1, 31))
        title, parts = self.choose(
            ((3, "Definitions/terms"), (3, "Duties/duties penalty st_exempt"),
             (2, "Penalties/st_no penalty rules"), (2, "Exemptions/act_exempt rules"))).split("/")
        head = self.choose(((2, "§ %d. %s.\n"), (1, "Sec. %d. %s.\n"),
                            (1, act + "\nSection %d. %s.\n")))
        head %= number, title
        marks = ["(%s)" % c for c in "abcdefgh"]
        self.local["first"] = marks[0]
        lines = []
        for part in parts.split():
            if part == "terms":
                head += self.slot("st_terms") + "\n"
                left = list(terms)
                for _ in range(self.pick([2, 3, 4])):
                    term, meaning = left.pop(self.pick(range(len(left))))
                    lines.append("\"%s\" means %s." % (term, self.expand(meaning)))
            elif part == "duties":
                for duty in self.several("duty", 1, 2):
                    lines.append("%s %s." % (self.slot("st_also" if lines else "st_each"), duty))
            elif part == "penalty" or not lines or self.choose(((1, "yes"), (1, ""))):
                lines.append(self.slot(part))
        return head + "".join("%s %s\n" % line for line in zip(marks, lines))

    # Notices of rulemaking

    def proposed(self):
        return self.slot("RULE") == "proposed rule"

    def do_proposes(self):
        return "is proposing" if self.proposed() else "is issuing a final rule"

    def do_short(self):
        return "proposal" if self.proposed() else "rule"

    def do_would(self):
        return "would" if self.proposed() else "will"

    def do_ACR(self):
        return AGENCIES[self.slot("AGENCY")][0]

    def do_things(self):
        """What the agency regulates: one subject for the document."""
        if "things" not in self.fixed:
            self.fixed["things"] = self.choose(weighted(AGENCIES[self.slot("AGENCY")][2]))
        return self.fixed["things"]

    def do_person(self):
        return self.slot("person_goods" if self.slot("things") in GOODS else "person_else")

    def do_shallnot(self):
        return self.slot("no_goods" if self.slot("things") in GOODS else "no_else")

    def do_LAW(self):
        if "law" not in self.fixed:
            self.fixed["law"] = LAWS.get(self.slot("things"), AGENCIES[self.slot("AGENCY")][3])
        return self.fixed["law"]

    def do_cfr(self):
        """The part is the document's: a second reference is to the same one."""
        if "part" not in self.fixed:
            self.fixed["part"] = self.pick([10, 25, 50, 60, 101, 110, 121, 201, 240, 301, 395,
                                            610, 807, 820])
        return "%d CFR Part %d" % (AGENCIES[self.slot("AGENCY")][1], self.fixed["part"])

    def notice(self):
        """What an agency proposes or does, or what it regulates."""
        form = self.choose(((3, "summary"), (4, "under"), (3, "regulated")))
        more = [(2, "under"), (2, "shallnot"), (2, "because"), (1, "estimate"), (1, "small")]
        if form == "summary":
            out = "SUMMARY: %s %s\n" % (self.slot("summary"), self.slot("because"))
            date = self.slot("date")
            out += ("DATES: %s %s.\n"
                    % (self.slot("comments" if self.proposed() else "effective"), date))
            return out + self.slot("supplement")
        sentences = [self.slot(form)]
        used = {form}
        for _ in range(self.pick([1, 2, 3])):
            name = self.choose([(weight, name) for weight, name in more if name not in used])
            used.add(name)
            sentences.append(self.slot(name))
        return " ".join(sentences) + "\n"
