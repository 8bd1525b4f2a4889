// tokenizer.c: encoding and decoding by tables. See tokenizer.h for how to use it.
//
// A text becomes ids in four steps, those of the `tokenizers` library:
//   1. the added tokens that skip normalization (the special ones) are cut out, leftmost and
//      longest first;
//   2. in what is left, the other added tokens are;
//   3. what is left of that goes through the GPT-2 pattern, which cuts it into words
//      's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   4. each word's bytes become tokens, and the pair of neighbours with the lowest merge rank, the
//      leftmost of equals, becomes one token until no pair has a rank (BPE).
//
// The tables, one block, integers little-endian, written by export_weights.py:
//   64 bytes  "BPETOK1\n", then u32 tokens, merge slots, edge slots, nodes, first root, second
//             root, bytes of text, 0...
//   merges    [slots] { left, right, rank, token }
//   edges     [slots] { node, byte, child, 0 }
//             both hash tables of u32; slots are powers of two, an empty slot's first number is
//             0xffffffff, a key starts at slot_of()
//   u32       node_token[nodes], byte_token[256], text_offset[tokens + 1]
//   bytes     flags[tokens] (1: special, 2: added), text[bytes of text]

#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the tables are little-endian and read where they lie: this machine is not"
#endif

_Static_assert(TOKENIZER_WORDS == 1 << 13, "encode_word takes 13 bits of its hash");

enum { OTHER, LETTER, NUMBER, SPACE };   // what the pattern tells apart
enum { SPECIAL = 1 };                    // in flags[]

// Beyond these a file is hostile: it would keep us busy for long. The exporter's hash tables are at
// most half full: their longest run of occupied slots is 28 in kl3m's (30,876 merges), 19 in
// GPT-NeoX's and 50 with 131,072 random pairs; a run of n has a chance of about 0.82^n, so one of
// 256 does not happen. kl3m's longest token has 808 bytes, its longest added token 555.
enum { LONGEST_RUN = 256, LONGEST_TOKEN = 4096 };

// Classes of all code points, Unicode 16.0.0: each entry is (first code point << 2) | class and
// holds up to the next entry. Class 0: other or unassigned, 1: letter, 2: number, 3: white space.
// Printed by tests/make/unicode_table.py.
static const uint32_t unicode_runs[] = {
    0, 39, 56, 131, 132, 194, 232, 261, 364, 389, 492, 535, 536, 643, 644, 681, 684, 714, 720, 725,
    728, 742, 745, 748, 754, 764, 769, 860, 865, 988, 993, 2824, 2841, 2888, 2945, 2964, 2993, 2996,
    3001, 3004, 3521, 3540, 3545, 3552, 3561, 3576, 3581, 3584, 3609, 3612, 3617, 3628, 3633, 3636,
    3641, 3720, 3725, 4056, 4061, 4616, 4649, 5312, 5317, 5468, 5477, 5480, 5505, 5668, 5953, 6060,
    6077, 6092, 6273, 6444, 6530, 6568, 6585, 6592, 6597, 6992, 6997, 7000, 7061, 7068, 7097, 7106,
    7145, 7156, 7165, 7168, 7233, 7236, 7241, 7360, 7477, 7832, 7877, 7880, 7938, 7977, 8108, 8145,
    8152, 8169, 8172, 8193, 8280, 8297, 8300, 8337, 8340, 8353, 8356, 8449, 8548, 8577, 8620, 8641,
    8736, 8741, 8764, 8833, 9000, 9233, 9448, 9461, 9464, 9537, 9540, 9569, 9608, 9626, 9664, 9669,
    9732, 9749, 9780, 9789, 9796, 9805, 9892, 9897, 9924, 9929, 9932, 9945, 9960, 9973, 9976, 10041,
    10044, 10097, 10104, 10109, 10120, 10138, 10177, 10184, 10194, 10216, 10225, 10228, 10261,
    10284, 10301, 10308, 10317, 10404, 10409, 10436, 10441, 10448, 10453, 10460, 10465, 10472,
    10597, 10612, 10617, 10620, 10650, 10688, 10697, 10708, 10773, 10808, 10813, 10824, 10829,
    10916, 10921, 10948, 10953, 10960, 10965, 10984, 10997, 11000, 11073, 11076, 11137, 11144,
    11162, 11200, 11237, 11240, 11285, 11316, 11325, 11332, 11341, 11428, 11433, 11460, 11465,
    11472, 11477, 11496, 11509, 11512, 11633, 11640, 11645, 11656, 11674, 11712, 11717, 11722,
    11744, 11789, 11792, 11797, 11820, 11833, 11844, 11849, 11864, 11877, 11884, 11889, 11892,
    11897, 11904, 11917, 11924, 11937, 11948, 11961, 12008, 12097, 12100, 12186, 12236, 12309,
    12340, 12345, 12356, 12361, 12452, 12457, 12520, 12533, 12536, 12641, 12652, 12661, 12664,
    12673, 12680, 12698, 12736, 12770, 12796, 12801, 12804, 12821, 12852, 12857, 12868, 12873,
    12964, 12969, 13008, 13013, 13032, 13045, 13048, 13173, 13180, 13185, 13192, 13210, 13248,
    13253, 13260, 13329, 13364, 13369, 13380, 13385, 13548, 13557, 13560, 13625, 13628, 13649,
    13660, 13666, 13693, 13704, 13722, 13796, 13801, 13824, 13845, 13916, 13929, 14024, 14029,
    14064, 14069, 14072, 14081, 14108, 14234, 14272, 14341, 14532, 14537, 14544, 14593, 14620,
    14658, 14696, 14853, 14860, 14865, 14868, 14873, 14892, 14897, 14992, 14997, 15000, 15005,
    15044, 15049, 15056, 15093, 15096, 15105, 15124, 15129, 15132, 15170, 15208, 15217, 15232,
    15361, 15364, 15490, 15568, 15617, 15648, 15653, 15796, 15905, 15924, 16385, 16556, 16637,
    16642, 16680, 16705, 16728, 16745, 16760, 16773, 16776, 16789, 16796, 16825, 16836, 16853,
    16904, 16953, 16956, 16962, 17000, 17025, 17176, 17181, 17184, 17205, 17208, 17217, 17388,
    17393, 18724, 18729, 18744, 18753, 18780, 18785, 18788, 18793, 18808, 18817, 18980, 18985,
    19000, 19009, 19140, 19145, 19160, 19169, 19196, 19201, 19204, 19209, 19224, 19233, 19292,
    19297, 19524, 19529, 19544, 19553, 19820, 19878, 19956, 19969, 20032, 20097, 20440, 20449,
    20472, 20485, 22964, 22973, 23043, 23045, 23148, 23169, 23468, 23482, 23493, 23524, 23553,
    23624, 23677, 23752, 23809, 23880, 23937, 23988, 23993, 24004, 24065, 24272, 24413, 24416,
    24433, 24436, 24450, 24488, 24514, 24552, 24642, 24680, 24705, 25060, 25089, 25108, 25117,
    25252, 25257, 25260, 25281, 25560, 25601, 25724, 25882, 25921, 26040, 26049, 26068, 26113,
    26288, 26305, 26408, 26434, 26476, 26625, 26716, 26753, 26964, 27138, 27176, 27202, 27240,
    27293, 27296, 27669, 27856, 27925, 27956, 27970, 28008, 28173, 28292, 28345, 28354, 28393,
    28568, 28673, 28816, 28930, 28968, 28981, 28994, 29033, 29176, 29185, 29228, 29249, 29420,
    29429, 29440, 29605, 29620, 29625, 29648, 29653, 29660, 29673, 29676, 29697, 30464, 30721,
    31832, 31841, 31864, 31873, 32024, 32033, 32056, 32065, 32096, 32101, 32104, 32109, 32112,
    32117, 32120, 32125, 32248, 32257, 32468, 32473, 32500, 32505, 32508, 32521, 32532, 32537,
    32564, 32577, 32592, 32601, 32624, 32641, 32692, 32713, 32724, 32729, 32756, 32771, 32812,
    32931, 32936, 32959, 32960, 33151, 33152, 33218, 33221, 33224, 33234, 33256, 33277, 33282,
    33320, 33345, 33396, 33801, 33804, 33821, 33824, 33833, 33872, 33877, 33880, 33893, 33912,
    33937, 33940, 33945, 33948, 33953, 33956, 33961, 33976, 33981, 34024, 34033, 34048, 34069,
    34088, 34105, 34108, 34114, 34317, 34326, 34344, 37250, 37488, 37802, 37888, 40410, 40528,
    45057, 45972, 45997, 46012, 46025, 46032, 46070, 46072, 46081, 46232, 46237, 46240, 46261,
    46264, 46273, 46496, 46525, 46528, 46593, 46684, 46721, 46748, 46753, 46780, 46785, 46812,
    46817, 46844, 46849, 46876, 46881, 46908, 46913, 46940, 46945, 46972, 47293, 47296, 49155,
    49156, 49173, 49182, 49184, 49286, 49320, 49349, 49368, 49378, 49389, 49396, 49413, 49756,
    49781, 49792, 49797, 50156, 50161, 50176, 50197, 50368, 50373, 50748, 50762, 50776, 50817,
    50944, 51137, 51200, 51330, 51368, 51490, 51520, 51526, 51584, 51714, 51752, 51910, 51968,
    53249, 79616, 79873, 168500, 168769, 168952, 168961, 170036, 170049, 170114, 170153, 170160,
    170241, 170428, 170493, 170616, 170625, 170906, 170944, 171101, 171136, 171145, 171556, 171565,
    171832, 171841, 171848, 171853, 171856, 171861, 171892, 171977, 172040, 172045, 172056, 172061,
    172076, 172081, 172172, 172226, 172248, 172289, 172496, 172553, 172752, 172866, 172904, 173001,
    173024, 173037, 173040, 173045, 173052, 173058, 173097, 173208, 173249, 173340, 173441, 173556,
    173585, 173772, 173885, 173890, 173928, 173953, 173972, 173977, 174018, 174057, 174076, 174081,
    174244, 174337, 174348, 174353, 174384, 174402, 174440, 174465, 174556, 174569, 174572, 174585,
    174784, 174789, 174792, 174805, 174812, 174821, 174840, 174849, 174852, 174857, 174860, 174957,
    174968, 174977, 175020, 175049, 175060, 175109, 175132, 175141, 175164, 175173, 175196, 175233,
    175260, 175265, 175292, 175297, 175468, 175473, 175528, 175553, 176012, 176066, 176104, 176129,
    220816, 220865, 220956, 220973, 221168, 254977, 256440, 256449, 256872, 257025, 257052, 257101,
    257120, 257141, 257144, 257149, 257188, 257193, 257244, 257249, 257268, 257273, 257276, 257281,
    257288, 257293, 257300, 257305, 257736, 257869, 259320, 259393, 259648, 259657, 259872, 260033,
    260080, 260545, 260564, 260569, 261108, 261186, 261224, 261253, 261356, 261381, 261484, 261529,
    261884, 261897, 261920, 261929, 261952, 261961, 261984, 261993, 262004, 262145, 262192, 262197,
    262300, 262305, 262380, 262385, 262392, 262397, 262456, 262465, 262520, 262657, 263148, 263198,
    263376, 263426, 263652, 263722, 263728, 264705, 264820, 264833, 265028, 265094, 265200, 265217,
    265346, 265360, 265397, 265478, 265481, 265514, 265516, 265537, 265688, 265729, 265848, 265857,
    266000, 266017, 266048, 266054, 266072, 266241, 266872, 266882, 266920, 266945, 267088, 267105,
    267248, 267265, 267424, 267457, 267664, 267713, 267756, 267761, 267820, 267825, 267852, 267857,
    267864, 267869, 267912, 267917, 267976, 267981, 268008, 268013, 268020, 268033, 268240, 268289,
    269532, 269569, 269656, 269697, 269728, 269825, 269848, 269853, 270020, 270025, 270060, 270337,
    270360, 270369, 270372, 270377, 270552, 270557, 270564, 270577, 270580, 270589, 270680, 270690,
    270721, 270812, 270822, 270849, 270972, 271006, 271040, 271233, 271308, 271313, 271320, 271342,
    271361, 271450, 271472, 271489, 271592, 271873, 272096, 272114, 272121, 272130, 272192, 272202,
    272385, 272388, 272449, 272464, 272469, 272480, 272485, 272600, 272642, 272676, 272769, 272886,
    272892, 272897, 273014, 273024, 273153, 273184, 273189, 273300, 273326, 273344, 273409, 273624,
    273665, 273752, 273762, 273793, 273868, 273890, 273921, 273992, 274086, 274112, 274433, 274724,
    274945, 275148, 275201, 275404, 275434, 275457, 275600, 275650, 275688, 275714, 275753, 275864,
    275901, 275992, 276866, 276988, 276993, 277160, 277185, 277192, 277257, 277268, 277505, 277622,
    277661, 277664, 277697, 277784, 277830, 277844, 277953, 278024, 278209, 278294, 278320, 278401,
    278492, 278541, 278752, 278858, 278976, 278981, 278988, 278997, 279000, 279053, 279232, 279361,
    279460, 279490, 279528, 279565, 279708, 279770, 279808, 279825, 279828, 279837, 279840, 279873,
    280012, 280025, 280028, 280077, 280268, 280325, 280340, 280386, 280425, 280428, 280433, 280436,
    280454, 280532, 280577, 280648, 280653, 280752, 280829, 280836, 281089, 281116, 281121, 281124,
    281129, 281144, 281149, 281208, 281213, 281252, 281281, 281468, 281538, 281576, 281621, 281652,
    281661, 281668, 281677, 281764, 281769, 281796, 281801, 281808, 281813, 281832, 281845, 281848,
    281921, 281924, 281973, 281992, 282113, 282152, 282157, 282160, 282169, 282172, 282177, 282328,
    282333, 282336, 282437, 282440, 282445, 282448, 282625, 282836, 282909, 282924, 282946, 282984,
    283005, 283016, 283137, 283328, 283409, 283416, 283421, 283424, 283458, 283496, 284161, 284348,
    284513, 284528, 284673, 284864, 284945, 284948, 284994, 285032, 285185, 285356, 285409, 285412,
    285442, 285480, 285506, 285584, 285697, 285804, 285890, 285936, 285953, 285980, 286721, 286896,
    287361, 287618, 287692, 287741, 287772, 287781, 287784, 287793, 287824, 287829, 287836, 287841,
    287936, 287997, 288000, 288005, 288008, 288066, 288104, 288385, 288416, 288425, 288580, 288645,
    288648, 288653, 288656, 288769, 288772, 288813, 288972, 289001, 289004, 289089, 289092, 289137,
    289320, 289397, 289400, 289473, 289764, 290561, 290692, 290754, 290792, 290817, 290852, 290857,
    291004, 291073, 291076, 291138, 291252, 291273, 291392, 291841, 291868, 291873, 291880, 291885,
    292036, 292121, 292124, 292162, 292200, 292225, 292248, 292253, 292260, 292265, 292392, 292449,
    292452, 292482, 292520, 293761, 293836, 293897, 293900, 293905, 293956, 293961, 294096, 294210,
    294248, 294593, 294596, 294658, 294740, 294913, 298600, 299010, 299452, 299521, 300304, 310849,
    311236, 311297, 315584, 315653, 315676, 315777, 331756, 331777, 334108, 361473, 361592, 361666,
    361704, 368641, 370916, 370945, 371068, 371074, 371112, 371137, 371452, 371458, 371496, 371521,
    371640, 371713, 371904, 371969, 371984, 372034, 372072, 372078, 372104, 372109, 372192, 372213,
    372288, 374017, 374196, 374210, 374248, 375041, 375298, 375388, 375809, 376108, 376129, 376132,
    376397, 376448, 376705, 376712, 376717, 376720, 376833, 401376, 401409, 406360, 406525, 406564,
    442305, 442320, 442325, 442352, 442357, 442364, 442369, 443532, 443593, 443596, 443713, 443724,
    443733, 443736, 443793, 443808, 443841, 445424, 454657, 455084, 455105, 455156, 455169, 455204,
    455233, 455272, 472002, 472040, 477954, 478032, 478082, 478160, 478594, 478692, 479233, 479572,
    479577, 479860, 479865, 479872, 479881, 479884, 479893, 479900, 479909, 479924, 479929, 479976,
    479981, 479984, 479989, 480016, 480021, 480280, 480285, 480300, 480309, 480340, 480345, 480372,
    480377, 480488, 480493, 480508, 480513, 480532, 480537, 480540, 480553, 480580, 480585, 481944,
    481953, 482052, 482057, 482156, 482161, 482284, 482289, 482388, 482393, 482516, 482521, 482620,
    482625, 482748, 482753, 482852, 482857, 482980, 482985, 483084, 483089, 483120, 483130, 483328,
    490497, 490620, 490645, 490668, 491713, 491960, 492545, 492724, 492765, 492792, 492802, 492840,
    492857, 492860, 494145, 494264, 494337, 494512, 494530, 494568, 496449, 496560, 496578, 496616,
    497473, 497592, 497601, 497606, 497644, 499585, 499612, 499617, 499632, 499637, 499644, 499649,
    499708, 499713, 500500, 500510, 500544, 500737, 501008, 501037, 501040, 501058, 501096, 504262,
    504496, 504502, 504512, 504518, 504532, 504838, 505016, 505022, 505080, 505857, 505872, 505877,
    505984, 505989, 505996, 506001, 506004, 506013, 506016, 506021, 506060, 506065, 506080, 506085,
    506088, 506093, 506096, 506121, 506124, 506141, 506144, 506149, 506152, 506157, 506160, 506165,
    506176, 506181, 506188, 506193, 506196, 506205, 506208, 506213, 506216, 506221, 506224, 506229,
    506232, 506237, 506240, 506245, 506252, 506257, 506260, 506269, 506284, 506289, 506316, 506321,
    506336, 506341, 506356, 506361, 506364, 506369, 506408, 506413, 506480, 506501, 506512, 506517,
    506536, 506541, 506608, 508930, 508980, 520130, 520168, 524289, 695168, 695297, 711912, 711937,
    712824, 712833, 735880, 735937, 765828, 765889, 768376, 778241, 780408, 786433, 806188, 806209,
    822976,
};

// ---- Characters ----

size_t utf8_char(const char *text, size_t n, uint32_t *code) {
    const uint8_t *s = (const uint8_t *)text;
    static const uint32_t least[5] = { 0, 0, 0x80, 0x800, 0x10000 };
    size_t length = s[0] < 0x80 ? 1 : s[0] < 0xC2 ? 0 : s[0] < 0xE0 ? 2
                  : s[0] < 0xF0 ? 3 : s[0] < 0xF5 ? 4 : 0;
    *code = UINT32_MAX;
    if (length == 0 || length > n) return 1;
    uint32_t c = length == 1 ? s[0] : s[0] & (0x7Fu >> length);
    for (size_t i = 1; i < length; i++) {
        if ((s[i] & 0xC0) != 0x80) return 1;
        c = c << 6 | (s[i] & 0x3F);
    }
    if (c < least[length] || c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) return 1;
    *code = c;
    return length;
}

size_t utf8_unfinished(const char *text, size_t n) {
    const uint8_t *s = (const uint8_t *)text + n;
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        uint8_t lead = s[-(ptrdiff_t)back];
        if ((lead & 0xC0) == 0x80) continue;
        if (lead < 0xC2 || lead > 0xF4 || back >= (lead < 0xE0 ? 2u : lead < 0xF0 ? 3u : 4u))
            return 0;
        // The second byte alone decides whether the form is overlong, a surrogate or past U+10FFFF.
        if (back > 1) {
            uint8_t second = s[1 - (ptrdiff_t)back];
            if ((lead == 0xE0 && second < 0xA0) || (lead == 0xED && second > 0x9F) ||
                (lead == 0xF0 && second < 0x90) || (lead == 0xF4 && second > 0x8F)) return 0;
        }
        return back;
    }
    return 0;
}

// The class of a code point: that of the last run that begins at or before it, by binary search.
int unicode_class(uint32_t code, uint32_t *next) {
    size_t low = 0, runs = sizeof unicode_runs / sizeof *unicode_runs, high = runs;
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (unicode_runs[middle] >> 2 <= code) low = middle;
        else high = middle;
    }
    *next = high < runs ? unicode_runs[high] >> 2 : 0x110000;
    return unicode_runs[low] & 3;
}

static uint8_t class_of_code(uint32_t code) {
    uint32_t next;
    return (uint8_t)unicode_class(code, &next);
}

// The class and *length of the character at s[0 .. n), n > 0. A byte that is not UTF-8 is OTHER.
static inline uint8_t class_at(const Tokenizer *t, const char *s, size_t n, size_t *length) {
    uint8_t byte = (uint8_t)s[0];
    *length = 1;
    if (byte < 0x80) return t->ascii_class[byte];
    uint32_t code;
    *length = utf8_char(s, n, &code);
    return code == UINT32_MAX ? OTHER : class_of_code(code);
}

// The first position from i on whose character is of another class.
static size_t end_of_run(const Tokenizer *t, const char *s, size_t i, size_t n, uint8_t class) {
    for (size_t length; i < n && class_at(t, s + i, n - i, &length) == class; i += length) {}
    return i;
}

// ---- Tables ----

// Fibonacci hashing (Knuth, The Art of Computer Programming 3, 6.4): the high half of a product by
// 2^64 / phi.
static inline uint32_t slot_of(uint32_t a, uint32_t b, uint32_t slots) {
    return (uint32_t)((((uint64_t)a << 32 | b) * 0x9E3779B97F4A7C15u) >> 32) & (slots - 1);
}

static inline const TokenizerSlot *look_up(const TokenizerSlot *table, uint32_t slots,
                                           uint32_t a, uint32_t b) {
    for (uint32_t i = slot_of(a, b, slots);; i = (i + 1) & (slots - 1)) {
        if (table[i].a == a && table[i].b == b) return &table[i];
        if (table[i].a == TOKENIZER_NONE) return NULL;
    }
}

// Whether a search meets an empty slot after LONGEST_RUN others at most, wherever it begins. Behind
// the last slot comes the first.
static bool quick_to_search(const TokenizerSlot *table, uint32_t slots) {
    uint32_t run = 0, longest = 0;
    for (uint64_t i = 0; i <= (uint64_t)slots + LONGEST_RUN; i++) {
        run = table[i & (slots - 1)].a == TOKENIZER_NONE ? 0 : run + 1;
        longest = run > longest ? run : longest;
    }
    return longest <= LONGEST_RUN;
}

// The tries must be trees: if nodes were shared, few of them would match any text to their depth,
// again from each byte.
static const char *flaw_of_tries(const Tokenizer *t, uint32_t nodes) {
    const char *flaw = NULL;
    uint32_t *depth = calloc(nodes, sizeof *depth);   // first the parent + 1
    if (depth == NULL) return "no memory to check the tokenizer's tries";
    for (uint32_t i = 0; i < t->edge_slots && !flaw; i++) {
        const TokenizerSlot *edge = &t->edges[i];
        if (edge->a == TOKENIZER_NONE) continue;
        // Children are numbered after their parents: so no walk goes in a circle.
        if (edge->x >= nodes || edge->x <= edge->a) flaw = "a trie has an unknown node";
        else if (depth[edge->x]) flaw = "a trie has a node with two parents";
        else depth[edge->x] = edge->a + 1;
    }
    for (uint32_t i = 0; i < nodes && !flaw; i++) {
        depth[i] = depth[i] ? depth[depth[i] - 1] + 1 : 0;
        if (depth[i] > LONGEST_TOKEN) flaw = "an added token is too long";
    }
    free(depth);
    return flaw;
}

const char *tokenizer_open(Tokenizer *t, const void *tables, size_t size) {
    const uint32_t *header = tables;
    if (size < 64 || memcmp(tables, "BPETOK1\n", 8) != 0) return "no tokenizer tables";
    uint32_t nodes = header[5], text_size = header[8];
    *t = (Tokenizer){ .tokens = header[2], .merge_slots = header[3], .edge_slots = header[4],
                      .root = { header[6], header[7] } };
    // Each count is below 2^32, so the sum in 64 bits cannot overflow.
    uint64_t need = 64 + 16 * ((uint64_t)t->merge_slots + t->edge_slots) +
                    4 * ((uint64_t)nodes + 256 + t->tokens + 1) + t->tokens + text_size;
    if (need != size) return "the tokenizer's tables do not fill their place";
    if (t->tokens == 0 || t->tokens == TOKENIZER_NONE) return "the tokenizer has no tokens";
    if (t->merge_slots == 0 || t->merge_slots & (t->merge_slots - 1) || t->edge_slots == 0 ||
        t->edge_slots & (t->edge_slots - 1))
        return "a hash table of the tokenizer is not a power of two";
    if (t->root[0] >= nodes || t->root[1] >= nodes) return "a trie of the tokenizer has no root";

    t->merges = (const TokenizerSlot *)(header + 16);
    t->edges = t->merges + t->merge_slots;
    t->node_token = (const uint32_t *)(t->edges + t->edge_slots);
    t->byte_token = t->node_token + nodes;
    t->text_offset = t->byte_token + 256;
    t->flags = (const uint8_t *)(t->text_offset + t->tokens + 1);
    t->text = (const char *)(t->flags + t->tokens);

    if (!quick_to_search(t->merges, t->merge_slots)) return "the table of merges is too full";
    for (uint32_t i = 0; i < t->merge_slots; i++)
        if ((t->merges[i].y >= t->tokens || t->merges[i].x == TOKENIZER_NONE) &&
            t->merges[i].a != TOKENIZER_NONE)
            return "a merge makes an unknown token";
    if (!quick_to_search(t->edges, t->edge_slots)) return "the table of trie edges is too full";
    const char *flaw = flaw_of_tries(t, nodes);
    if (flaw) return flaw;
    for (uint32_t i = 0; i < nodes; i++)
        if (t->node_token[i] != TOKENIZER_NONE && t->node_token[i] >= t->tokens)
            return "a trie ends in an unknown token";
    for (int i = 0; i < 256; i++)
        if (t->byte_token[i] >= t->tokens) return "a byte has no token";
    if (t->text_offset[0] != 0 || t->text_offset[t->tokens] != text_size)
        return "the tokens' texts are out of place";
    for (uint32_t i = 0; i < t->tokens; i++) {
        if (t->text_offset[i] > t->text_offset[i + 1]) return "the tokens' texts are out of order";
        if (t->text_offset[i + 1] - t->text_offset[i] > LONGEST_TOKEN) return "a token is too long";
    }
    // An added token of no length would match everywhere without end.
    if (t->node_token[t->root[0]] != TOKENIZER_NONE || t->node_token[t->root[1]] != TOKENIZER_NONE)
        return "an added token is empty";

    for (uint32_t trie = 0; trie < 2; trie++)
        for (uint32_t byte = 0; byte < 256; byte++) {
            const TokenizerSlot *edge = look_up(t->edges, t->edge_slots, t->root[trie], byte);
            if (edge == NULL) continue;
            t->first[trie][byte] = edge->x;
            for (uint32_t next = 0; next < 256; next++)
                if (look_up(t->edges, t->edge_slots, edge->x, next))
                    t->second[trie][byte * 32 + next / 8] |= (uint8_t)(1 << next % 8);
        }
    for (uint32_t code = 0; code < 128; code++) t->ascii_class[code] = class_of_code(code);
    return NULL;
}

// ---- Encoding ----

// A word's symbols are a linked list over its bytes: symbol i starts at byte i, and next[i] is
// where the one after it starts. least is a tournament over the ranks of the pairs (i, next[i]):
// leaf i is least[leaves + i], a node holds the smaller of its two children, and so the root,
// least[1], the rank to merge next. A merge changes three leaves, so a word of n bytes takes
// n log n steps, whatever it is made of.
typedef struct {
    uint32_t *symbol, *next, *previous;   // [n]
    uint32_t *merged;                     // [n] the token that pair i would become
    uint32_t *least;                      // [2 * leaves]
    uint32_t leaves;                      // a power of two, >= n
} Word;

enum { SHORT_WORD = 128 };                // bytes; a longer word takes its arrays from the heap

// The rank of the pair at i, or TOKENIZER_NONE; the token it would become goes to merged[i].
static inline uint32_t rank_pair(const Tokenizer *t, Word *w, uint32_t i, uint32_t n) {
    if (w->next[i] >= n) return TOKENIZER_NONE;
    const TokenizerSlot *m =
        look_up(t->merges, t->merge_slots, w->symbol[i], w->symbol[w->next[i]]);
    if (m == NULL) return TOKENIZER_NONE;
    w->merged[i] = m->y;
    return m->x;
}

static inline void set_leaf(Word *w, uint32_t i, uint32_t rank) {
    uint32_t k = w->leaves + i;
    if (w->least[k] == rank) return;
    for (w->least[k] = rank; k > 1; k /= 2) {
        uint32_t a = w->least[k], b = w->least[k ^ 1], smaller = a < b ? a : b;
        if (w->least[k / 2] == smaller) return;
        w->least[k / 2] = smaller;
    }
}

static size_t merge_word(const Tokenizer *t, Word *w, const char *s, uint32_t n, uint32_t *ids) {
    for (uint32_t i = 0; i < n; i++) {
        w->symbol[i] = t->byte_token[(uint8_t)s[i]];
        w->next[i] = i + 1;
        w->previous[i] = i - 1;           // of the first: never read
    }
    for (uint32_t i = 0; i < w->leaves; i++)
        w->least[w->leaves + i] = i < n ? rank_pair(t, w, i, n) : TOKENIZER_NONE;
    for (uint32_t k = w->leaves - 1; k > 0; k--)
        w->least[k] = w->least[2 * k] < w->least[2 * k + 1] ? w->least[2 * k] : w->least[2 * k + 1];

    while (w->least[1] != TOKENIZER_NONE) {
        uint32_t k = 1;
        while (k < w->leaves)   // to the leftmost of equals
            k = w->least[2 * k] == w->least[k] ? 2 * k : 2 * k + 1;
        uint32_t i = k - w->leaves, gone = w->next[i];
        w->symbol[i] = w->merged[i];
        w->next[i] = w->next[gone];
        if (w->next[i] < n) w->previous[w->next[i]] = i;
        set_leaf(w, gone, TOKENIZER_NONE);
        set_leaf(w, i, rank_pair(t, w, i, n));
        if (i > 0) set_leaf(w, w->previous[i], rank_pair(t, w, w->previous[i], n));
    }
    size_t count = 0;
    for (uint32_t i = 0; i < n; i = w->next[i]) ids[count++] = w->symbol[i];
    return count;
}

// Step 4: one word of the pattern. Returns the number of ids, or -1 without memory.
static ptrdiff_t merge_any_word(const Tokenizer *t, const char *s, size_t n, uint32_t *ids) {
    uint32_t near[6 * SHORT_WORD], *memory = near;
    size_t leaves = 2;
    while (leaves < n) leaves *= 2;
    if (n > UINT32_MAX / 2) return -1;
    if (n > SHORT_WORD) memory = malloc((4 * n + 2 * leaves) * sizeof *memory);
    if (memory == NULL) return -1;
    Word w = { memory, memory + n, memory + 2 * n, memory + 3 * n, memory + 4 * n,
               (uint32_t)leaves };
    size_t count = merge_word(t, &w, s, (uint32_t)n, ids);
    if (memory != near) free(memory);
    return (ptrdiff_t)count;
}

// A word of 2 to 16 bytes as two numbers: words of one length have the same numbers only if they
// are the same. Loads of constant size that overlap take a third of the time of copying n bytes.
static inline void key_of(const char *s, size_t n, uint64_t key[2]) {
    uint32_t low, high;
    if (n >= 8) {
        memcpy(&key[0], s, 8);
        memcpy(&key[1], s + n - 8, 8);
        return;
    }
    key[1] = 0;
    if (n >= 4) {
        memcpy(&low, s, 4);
        memcpy(&high, s + n - 4, 4);
        key[0] = (uint64_t)high << 32 | low;
    } else key[0] = (uint64_t)(uint8_t)s[0] | (uint64_t)(uint8_t)s[n / 2] << 8 |
                    (uint64_t)(uint8_t)s[n - 1] << 16;
}

// The same with a memory: a text's words are mostly words that it had before (measured on licence
// texts: three times as fast). A word has one place in the memory, by a hash of its bytes, and
// takes it from whatever was there.
static ptrdiff_t encode_word(Tokenizer *t, const char *s, size_t n, uint32_t *ids) {
    if (n == 1) {
        ids[0] = t->byte_token[(uint8_t)s[0]];
        return 1;
    }
    if (n > 16 || t->words == NULL) return merge_any_word(t, s, n, ids);
    uint64_t key[2];
    key_of(s, n, key);
    uint64_t hash = (key[0] ^ (key[1] << 1 | key[1] >> 63)) * 0x9E3779B97F4A7C15u;
    TokenizerWord *word = &t->words[hash >> 51];
    if (word->length == n && word->key[0] == key[0] && word->key[1] == key[1]) {
        for (int i = 0; i < word->count; i++) ids[i] = word->ids[i];
        return word->count;
    }
    ptrdiff_t count = merge_any_word(t, s, n, ids);
    if (count > 0 && (size_t)count <= sizeof word->ids / sizeof *ids) {
        *word = (TokenizerWord){ .key = { key[0], key[1] }, .length = (uint8_t)n,
                                 .count = (uint8_t)count };
        memcpy(word->ids, ids, (size_t)count * sizeof *ids);
    }
    return count;
}

// The length of the contraction at s[0 .. n), 0 if there is none.
static size_t contraction(const char *s, size_t n) {
    if (n < 2 || s[0] != '\'') return 0;
    if (strchr("stmd", s[1]) && s[1]) return 2;
    return n > 2 && (memcmp(s + 1, "re", 2) == 0 || memcmp(s + 1, "ve", 2) == 0 ||
                     memcmp(s + 1, "ll", 2) == 0) ? 3 : 0;
}

// Step 3: the end of the pattern's match that begins at s[i].
static size_t end_of_word(const Tokenizer *t, const char *s, size_t i, size_t n) {
    size_t length = contraction(s + i, n - i);
    if (length) return i + length;
    size_t j = i + (s[i] == ' ' && i + 1 < n);   // " ?" before letters, numbers or others
    uint8_t class = class_at(t, s + j, n - j, &length);
    if (class != SPACE) return end_of_run(t, s, j + length, n, class);

    // White space: all of it at the end of the text, else without its last character, which may
    // belong to what follows; a single one is a word by itself.
    size_t end = i, last = i;
    while (end < n && class_at(t, s + end, n - end, &length) == SPACE) {
        last = end;
        end += length;
    }
    return end == n || last == i ? end : last;
}

// The added token of a trie that begins at s[i] and is the longest, or TOKENIZER_NONE; its length
// in bytes.
static uint32_t match_added(const Tokenizer *t, int trie, const char *s, size_t i, size_t n,
                            size_t *length) {
    uint32_t node = t->first[trie][(uint8_t)s[i]], found = t->node_token[node];
    if (node == 0) return TOKENIZER_NONE;
    *length = 1;
    if (n - i < 2 || !(t->second[trie][(uint8_t)s[i] * 32 + (uint8_t)s[i + 1] / 8] >>
                       (uint8_t)s[i + 1] % 8 & 1)) return found;
    for (size_t j = i + 1; j < n; j++) {
        const TokenizerSlot *edge = look_up(t->edges, t->edge_slots, node, (uint8_t)s[j]);
        if (edge == NULL) break;
        node = edge->x;
        if (t->node_token[node] == TOKENIZER_NONE) continue;
        found = t->node_token[node];
        *length = j + 1 - i;
    }
    return found;
}

// Steps 1 and 2 (trie 0 and 1), and then 3. A special token that is to be read as plain text still
// ends the search for others at its place, as in the library.
static ptrdiff_t encode_from(Tokenizer *t, int trie, const char *s, size_t n, bool plain_specials,
                             uint32_t *ids) {
    ptrdiff_t count = 0;
    for (size_t start = 0, i = 0; start < n;) {
        uint32_t token = TOKENIZER_NONE;
        size_t length = 0;
        if (trie == 2) i = end_of_word(t, s, start, n);
        else {
            for (; i < n; i++) {
                if (t->first[trie][(uint8_t)s[i]] == 0) continue;
                token = match_added(t, trie, s, i, n, &length);
                if (token == TOKENIZER_NONE) continue;
                if (!(plain_specials && t->flags[token] & SPECIAL)) break;
                i += length - 1;
                token = TOKENIZER_NONE;
            }
        }
        if (i > start) {
            ptrdiff_t more = trie == 2 ? encode_word(t, s + start, i - start, ids + count)
                                       : encode_from(t, trie + 1, s + start, i - start,
                                                     plain_specials, ids + count);
            if (more < 0) return -1;
            count += more;
        }
        if (token != TOKENIZER_NONE) {
            ids[count++] = token;
            i += length;
        }
        start = i;
    }
    return count;
}

ptrdiff_t tokenizer_encode(Tokenizer *t, const char *text, size_t n, bool plain_specials,
                           uint32_t *ids) {
    // Without the memory for words it is slower, with the same ids.
    if (t->words == NULL) t->words = calloc(TOKENIZER_WORDS, sizeof *t->words);
    return encode_from(t, 0, text, n, plain_specials, ids);
}

void tokenizer_close(Tokenizer *t) {
    free(t->words);
    t->words = NULL;
}

// ---- Decoding ----

const char *tokenizer_text(const Tokenizer *t, uint32_t id, size_t *n) {
    if (id >= t->tokens) id = t->tokens, *n = 0;
    else *n = t->text_offset[id + 1] - t->text_offset[id];
    return t->text + t->text_offset[id];
}

bool tokenizer_is_special(const Tokenizer *t, uint32_t id) {
    return id < t->tokens && t->flags[id] & SPECIAL;
}

uint32_t tokenizer_find_added(const Tokenizer *t, const char *content) {
    size_t n = strlen(content);
    for (int trie = 0; trie < 2; trie++) {
        size_t length = 0;
        uint32_t token = match_added(t, trie, content, 0, n, &length);
        if (token != TOKENIZER_NONE && length == n) return token;
    }
    return TOKENIZER_NONE;
}
